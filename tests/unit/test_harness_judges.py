"""Verdicts on answers of lm-eval's tasks, some from programs in the sandbox."""

from pathlib import Path

import pytest

from lorapar_ray.config import EvaluateConfig
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.harness import judges
from lorapar_ray.evaluation.tasks import catalogue_of
from tests.unit.lm_eval_reference import lines


def test_numbers_are_judged_in_another_process_within_limits() -> None:
    docs = [{"question": "1 + 1?", "answer": "2"}] * 2
    long = "The answer is " + "9" * 10_000
    assert judges.numeric([["It is 2.", "It is 3."], [long, "2.0"]], docs) == [[1.0, 0.0], [0.0, 1.0]]


def test_programs_are_judged_in_the_sandbox() -> None:
    doc = {
        "prompt": 'def double(n):\n    """Twice n."""\n',
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    }
    verdicts = judges.humaneval([["    return 2 * n\n", "    return n\n"]], [doc])
    assert verdicts == [[1.0, 0.0]] and judges.right([], verdicts) == 0.5
    with judges.judged_by(judges.SandboxConfig(), 2):
        assert judges.right([], verdicts) == 1.0
    assert judges.mbpp([["def f(n):\n    return n\n"]], [{"test_list": ["assert f(1) == 1"]}]) == [[1.0]]
    assert [shot["task_id"] for shot in judges.mbpp_shots()] == [2, 3, 4]


def test_samples_and_their_k() -> None:
    with pytest.raises(ValueError, match="pass@4 needs at least 4 samples of each question; samples is 2"):
        EvaluateConfig(pass_at=4, samples=2, temperature=1.0)
    with pytest.raises(ValueError, match="greedy answers are all the same"):
        EvaluateConfig(samples=2)
    with (
        pytest.raises(UserError, match=r"pass@k: k = 3 needs at least 3 samples"),
        judges.judged_by(judges.SandboxConfig(), 3),
    ):
        judges.right([], [[1.0, 0.0]])


def test_programs_that_nothing_can_confine_are_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(layer: str) -> None:
        raise UserError(f"sandbox.layer: {layer} does not work here")

    monkeypatch.setattr("lorapar_ray.sandbox.choose", broken)
    file = lines(tmp_path / "h.jsonl", {"task_id": "x", "prompt": "p", "entry_point": "f", "test": "t"})
    with pytest.raises(UserError, match=r"sandbox\.layer: auto does not work here"):
        catalogue_of(EvaluateConfig(tasks=["humaneval"], data={"humaneval": file}))
