"""Rewards in the sandbox: model-written programs, and the user's functions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lorapar_ray.config import GrpoConfig, RewardConfig, SandboxConfig
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.rewards import RewardPool, RewardSpec
from lorapar_ray.grpo.rewards.code import CODE_TESTS, job_of
from lorapar_ray.grpo.rewards.registry import require_rewards
from lorapar_ray.sandbox import Limits, Sandbox, survey
from lorapar_ray.sandbox.tasks import called_names, code_of, humaneval_job, mbpp_job

LAYERS = [finding.name for finding in survey()[:2] if finding.layer is not None]
ADD = "```python\ndef add(a, b):\n    return a + b\n```"
HUMANEVAL = {
    "prompt": 'def half(x):\n    return x / 2\n\ndef add(a, b):\n    """Sum of two numbers."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 1) == half(4)\n    assert add(2, 2) == 4\n",
}


@pytest.mark.slow
def test_programs_are_rewarded_for_passing_their_tests() -> None:
    completions = [
        *(f"Here it is:\n{ADD}\nDone.", "def add(a, b):\n    return a - b", "while True: pass", "no program", ADD),
        *(ADD, "    return a + b", ADD.replace("a + b", "0"), f"{ADD}\nor rather\n```\ndef add(a, b): return 0\n"),
    ]
    asserts = "assert add(2, 2) == 4"
    mbpp = {"test_list": [asserts], "test_imports": ["import math"]}
    answers = [
        *([asserts] * 4),
        *(str([asserts, "assert add(1, 2) == 3"]), json.dumps(mbpp), json.dumps(HUMANEVAL), json.dumps(HUMANEVAL)),
        json.dumps({"tests": "assert add(1, 1) == two", "setup": "two = 2"}),
    ]
    settings = SandboxConfig(time_limit_s=2)
    with RewardPool([RewardSpec(CODE_TESTS)], time_limit_s=60, memory_limit_mb=1024, sandbox=settings) as pool:
        scored = pool.score(["q"] * len(answers), completions, {"answer": answers})
    assert scored.total == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert scored.failures == {}


@pytest.mark.slow
def test_a_program_has_the_sandboxs_limits_whatever_those_of_rewards_are() -> None:
    """It sleeps longer than a reward may take, and holds more address space than the reward's process may."""
    greedy = "def add(a, b):\n    import time\n    time.sleep(2)\n    return a + b + 0 * len(bytes(3 * 2**30))"
    completions = [greedy, greedy.replace("3 *", "5 *"), "while True: pass"]
    settings = SandboxConfig(time_limit_s=6, memory_mb=4 * 1024)
    with RewardPool([RewardSpec(CODE_TESTS)], time_limit_s=1, memory_limit_mb=256, sandbox=settings) as pool:
        scored = pool.score(["q"] * 3, completions, {"answer": ["assert add(2, 2) == 4"] * 3})
    assert scored.total == [1.0, 0.0, 0.0] and scored.failures == {}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_users_reward_can_be_isolated(layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPAR_SECRET", "x")
    (tmp_path / "typing_extensions.py").write_text("raise ImportError('the last on the path came first')")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # as setuptools does for its own copies
    name = "tests.unit.bad_rewards:{}"
    specs = [RewardSpec(name.format("reaches_out"), isolate=True), RewardSpec(name.format("reaches_out_openly"))]
    with RewardPool(specs, time_limit_s=60, memory_limit_mb=512, sandbox=SandboxConfig(layer=layer)) as pool:  # type: ignore[arg-type]
        scored = pool.score(["q"], ["a"], {"answer": ["a"]})
    # no reward has secrets in its environment, isolated or not; one that is not isolated has access to all else
    assert scored.parts == {specs[0].name: [0.0], specs[1].name: [14.0]}


BREAKS = list(zip(LAYERS, ("hangs", "leaves"), ("timeout", "crashed"), strict=False))


@pytest.mark.parametrize(("layer", "reward", "cause"), BREAKS)
@pytest.mark.slow
def test_a_failing_isolated_reward_loses_only_its_sample(layer: str, reward: str, cause: str) -> None:
    specs = [RewardSpec(f"tests.unit.bad_rewards:{reward}", isolate=True)]
    settings = SandboxConfig(layer=layer)  # type: ignore[arg-type]
    limit = 2 if cause == "timeout" else 60
    with RewardPool(specs, time_limit_s=limit, memory_limit_mb=512, sandbox=settings) as pool:
        assert pool.score(["q"], ["bad"], {"answer": ["1"]}).failures == {cause: 1}
        assert pool.score(["q"], ["1"], {"answer": ["1"]}).total == [1.0]


def test_a_reward_that_needs_a_sandbox_says_so_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorapar_ray.sandbox import choice

    broken = tuple(choice.Finding(each.name, None, "broken") for each in survey())
    monkeypatch.setattr(choice, "survey", lambda: broken)
    for reward in (RewardConfig(name=CODE_TESTS), RewardConfig(name="numeric_answer", isolate=True)):
        with pytest.raises(UserError, match=r"nothing here can confine .* bubblewrap: broken; sandlock: broken"):
            require_rewards(GrpoConfig(rewards=[reward]))
    with pytest.raises(UserError, match=r"sandbox\.layer: sandlock does not work here: broken"):
        require_rewards(GrpoConfig(rewards=[RewardConfig(name=CODE_TESTS)], sandbox=SandboxConfig(layer="sandlock")))
    require_rewards(GrpoConfig(rewards=[RewardConfig(name="numeric_answer")]))


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        ("assert add(1, 1) == 2", ("add",)),
        ("assert set(shared((1,), (1,))) == set((1,))", ("shared",)),
        ("import math\nassert math.isclose(area(1), 3.1)", ("area",)),
        ("def check(f):\n    assert f(2)\ncheck(half)\nassert half(4) == 2", ("half",)),
        ("assert sum(10, 15) == 6", ("sum",)),
        ("x = [g(n) for n in range(3)]\nassert all(x)", ("g",)),
    ],
)
def test_tested_functions_are_found_from_the_tests(tests: str, names: tuple[str, ...]) -> None:
    assert called_names(tests) == names


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("assert 1 +", "tests: not a Python program"),
        ("42", "tests: they call no function"),
        ('{"prompt": "x"}', "HumanEval: a row has no 'entry_point'"),
        ('{"test_list": []}', "MBPP: a row has no 'test_list'"),
        ("[1, 2", "neither JSON nor a program"),
        ("[" * 100_000, "neither JSON nor a program"),
        ("[1, null]", "is not a set of tests"),
        ('{"test_list": ["assert f()"], "test_imports": 3}', "is not a set of tests"),
        ('{"prompt": 1, "entry_point": 2, "test": 3}', "is not a set of tests"),
    ],
)
def test_answers_without_tests_are_named(answer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        job_of("x = 1", answer)


def test_the_last_block_is_the_program() -> None:
    assert code_of("x = 1") == "x = 1"
    assert code_of("a\n```py\nx = 1\n```\nb\n```\ny = 2\n```") == "y = 2\n"
    assert code_of("```python\nx = 1") == "x = 1"
    assert code_of("```Python3 \r\nx = 1\n```") == "x = 1\n"
    endless = "```" + " " * 10**6  # a quadratic pattern would take hours
    assert code_of(endless) == endless


def test_a_program_does_not_replace_names_that_the_tests_use() -> None:
    """A program must not replace `set`, a helper of the prompt, or a module that the tests forgot to import."""
    cheat = "def set(x): return 1\ndef half(x): return add(1, 1)\nclass sys: getsizeof = 0\ndef add(a, b): return 3\n"
    with Sandbox(limits=Limits(seconds=20), workers=1) as sandbox:
        verdicts = sandbox.run(
            [
                mbpp_job({"test_list": ["assert set([add(2, 2)]) == set([4])"]}, cheat),
                humaneval_job(HUMANEVAL, f"    return 3\n{cheat}"),
                mbpp_job({"test_list": ["assert add(1, 2) + 0 * sys.maxsize == 3"]}, cheat),
            ]
        )
    assert [verdict.reason for verdict in verdicts] == ["failed", "failed", "passed"]
