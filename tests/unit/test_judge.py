"""Teachers as judges: expected grades, their mean, and broken teachers."""

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from lorapar_ray.config import Config, TeacherConfig
from lorapar_ray.engines.record import GroupHead
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.failures import Failures
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.rewards import RewardBatch
from lorapar_ray.grpo.rewards.judge import Grades, Judge, expected_grade, judging
from lorapar_ray.labeling.teachers import Asked

KEY = "a-key-that-has-expired"


class Grader:
    """A fake teacher: certain of `extra_body.grades[completion]`; raises or hangs as configured."""

    def __init__(self, teacher: TeacherConfig) -> None:
        self._settings = teacher.extra_body

    async def ask(self, prompt: str, choices: list[str]) -> Asked:
        assert prompt.endswith("\nGrade:") and "Question: q\nReference answer: 7\n" in prompt
        completion = prompt.removesuffix("\nGrade:").rsplit(": ", 1)[-1]
        if completion in self._settings.get("hangs_at", []):
            await asyncio.sleep(60)
        if completion in self._settings.get("raises_at", []):
            raise ConnectionError("away")
        if completion in self._settings.get("cancels_at", []):
            own = asyncio.ensure_future(asyncio.sleep(60))
            own.cancel()
            await own
        best = str(self._settings["grades"][completion])
        return Asked([0.0 if choice == best else -math.inf for choice in choices], 10, 0.0)


def grader(name: str, grades: dict[str, int], **settings: Any) -> dict[str, Any]:
    model = f"{__name__}:Grader"
    return {"name": name, "kind": "python", "model": model, "extra_body": {"grades": grades, **settings}}


def tree(*teachers: dict[str, Any], judges: tuple[str, ...] = (), **settings: Any) -> Config:
    return Config.model_validate(
        {
            "name": "judged",
            "model": {"path": "m"},
            "data": {"train": [{"reader": "file", "path": "rows.jsonl"}]},
            "label": {"strategy": "vote", "teachers": teachers, "quorum": len(teachers), "backoff_s": 0.01},
            "grpo": {
                "rewards": [{"name": "judge", "weight": 2.0}, {"name": "numeric_answer"}],
                "judge": {"teachers": judges, "time_limit_s": 1.0, **settings},
            },
        }
    )


def graded(config: Config, *completions: str) -> Grades:
    with judging(config) as settings:
        assert settings is not None
        judge = Judge(**settings)
        return asyncio.run(judge.grades(["q"] * len(completions), completions, ["7"] * len(completions)))


def grades(config: Config, *completions: str) -> list[float | None]:
    return graded(config, *completions).values


class Endpoint(BaseHTTPRequestHandler):
    """Answers with the status `status`: 200 with the grade 5, others with the key that was sent."""

    status: ClassVar[int]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        good = b'{"choices": [{"logprobs": {"top_logprobs": [{"5": -0.1, "4": -30}]}}]}'
        body = good if self.status == 200 else f"no such key: {self.headers['Authorization']}".encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def endpoint(status: int) -> Iterator[str]:
    Endpoint.status = status
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def far(url: str, **settings: Any) -> dict[str, Any]:
    return {"name": "far", "kind": "remote", "model": "m", "base_url": url, **settings}


def test_the_mean_of_the_chosen_teachers_counts() -> None:
    teachers = (grader("a", {"x": 5, "y": 1}), grader("b", {"x": 3, "y": 1}), grader("c", {}))
    assert grades(tree(*teachers, judges=("a", "b")), "x", "y") == pytest.approx([0.75, 0.0])


def test_a_broken_teacher_loses_only_its_grade() -> None:
    teachers = (grader("a", {"x": 5, "y": 2}, hangs_at=["z"]), grader("b", {"x": 1}, raises_at=["y", "z"]))
    assert grades(tree(*teachers), "x", "y", "z") == [pytest.approx(0.5), pytest.approx(0.25), None]


def test_a_judge_that_never_answers_stops_the_stage_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGES_KEY", KEY)
    with endpoint(401) as url:
        found = graded(tree(far(url, api_key_env="JUDGES_KEY")), "x", "y")
    assert found.values == [None, None]
    head = GroupHead(prompt_tokens=1, lengths=(1, 1), finished=(True, True), versions=(0, 0))
    config = tree(grader("a", {}))
    group = Group(0, None, head)
    scored = RewardBatch([0.0, 1.0], {"numeric_answer": [0.0, 1.0]}, {})
    group.take(found.added_to(scored, {"judge": 2.0, "numeric_answer": 1.0}), config.grpo)
    with pytest.raises(UserError) as stopped:
        Failures().report([group], 0)
    said = str(stopped.value)
    assert "'judge' failed on all 2 samples of step 1: no teacher graded it: far: ShutOut: status 401" in said
    assert "no such key" in said and KEY not in said


def test_the_reason_of_a_missing_grade_is_that_of_each_teacher() -> None:
    teachers = (grader("a", {}, hangs_at=["z"]), grader("b", {}, raises_at=["z"]), grader("c", {}, cancels_at=["z"]))
    found = graded(tree(*teachers), "z")
    assert found.values == [None]
    assert found.error.startswith("no teacher graded it: a: it takes longer than grpo.judge.time_limit_s (1)")
    assert "b: ConnectionError: away" in found.error and "c: RuntimeError: CancelledError" in found.error


@pytest.mark.slow
def test_waiting_for_a_rate_limit_does_not_count_against_the_time_limit() -> None:
    """The last of 16 questions waits for longer than the limit of one question."""
    with endpoint(200) as url:
        config = tree(far(url, requests_per_second=4), time_limit_s=2.0)
        with judging(config) as settings:
            assert settings is not None
            found = asyncio.run(Judge(**settings).grades(["q"] * 16, ["x"] * 16, ["7"] * 16))
    assert found == Grades([pytest.approx(1.0)] * 16)


@pytest.mark.slow
def test_the_judges_of_all_shards_share_a_teachers_rate_limit() -> None:
    with endpoint(200) as url, judging(tree(far(url, requests_per_second=2)), 4) as settings:
        assert settings is not None

        async def four_seconds() -> float:
            clock = asyncio.get_running_loop().time
            judge, begun = Judge(**settings), clock()
            await judge.grades(["q"] * 3, ["x"] * 3, ["7"] * 3)
            return clock() - begun

        assert asyncio.run(four_seconds()) > 3.9  # each of four sends half a request per second


def test_a_grade_is_expected_under_the_teachers_probabilities() -> None:
    assert expected_grade([math.log(0.25), math.log(0.5), math.log(0.25)]) == pytest.approx(0.5)
    assert expected_grade([math.log(0.25) + 3, math.log(0.75) + 3]) == pytest.approx(0.75)


def test_grades_join_the_other_rewards() -> None:
    scored = RewardBatch([1.0, 0.0], {"numeric_answer": [1.0, 0.0]}, {"timeout": 1})
    joined = Grades([0.5, None], "away").added_to(scored, {"judge": 2.0, "numeric_answer": 1.0})
    parts = {"judge": [0.5, None], "numeric_answer": [1.0, 0.0]}
    assert joined == RewardBatch([2.0, 0.0], parts, {"timeout": 1, "judge": 1}, {"judge": 1}, {"judge": "away"})
    assert list(joined.parts) == ["judge", "numeric_answer"]


def test_a_judge_needs_teachers_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"label\.teachers by name; there are a"):
        tree(grader("a", {}), judges=("b",))
    with pytest.raises(ValueError, match=r"prompt: takes .*always, \{completion\}"):
        tree(grader("a", {}), prompt="Is it good?")
    with pytest.raises(ValueError, match="there are none"):
        Config.model_validate(
            {
                "name": "x",
                "model": {"path": "m"},
                "data": {"train": [{"reader": "file", "path": "r"}]},
                "grpo": {"rewards": [{"name": "judge"}]},
            }
        )
