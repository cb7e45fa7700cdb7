"""Teachers as judges: expected grades, their mean, and broken teachers."""

import asyncio
import math
from typing import Any

import pytest

from lorapar_ray.config import Config, TeacherConfig
from lorapar_ray.grpo.rewards import RewardBatch
from lorapar_ray.grpo.rewards.judge import Judge, expected_grade, judging
from lorapar_ray.grpo.rewards.pool import with_part
from lorapar_ray.labeling.teachers import Asked


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


def grades(config: Config, *completions: str) -> list[float | None]:
    with judging(config) as settings:
        assert settings is not None
        judge = Judge(**settings)
        return asyncio.run(judge.grades(["q"] * len(completions), completions, ["7"] * len(completions)))


def test_the_mean_of_the_chosen_teachers_counts() -> None:
    teachers = (grader("a", {"x": 5, "y": 1}), grader("b", {"x": 3, "y": 1}), grader("c", {}))
    assert grades(tree(*teachers, judges=("a", "b")), "x", "y") == pytest.approx([0.75, 0.0])


def test_a_broken_teacher_loses_only_its_grade() -> None:
    teachers = (grader("a", {"x": 5, "y": 2}, hangs_at=["z"]), grader("b", {"x": 1}, raises_at=["y", "z"]))
    assert grades(tree(*teachers), "x", "y", "z") == [pytest.approx(0.5), pytest.approx(0.25), None]


def test_a_grade_is_expected_under_the_teachers_probabilities() -> None:
    assert expected_grade([math.log(0.25), math.log(0.5), math.log(0.25)]) == pytest.approx(0.5)
    assert expected_grade([math.log(0.25) + 3, math.log(0.75) + 3]) == pytest.approx(0.75)


def test_grades_join_the_other_rewards() -> None:
    scored = RewardBatch([1.0, 0.0], {"numeric_answer": [1.0, 0.0]}, {"timeout": 1})
    joined = with_part(scored, "judge", 2.0, [0.5, None], ["judge", "numeric_answer"])
    assert joined == RewardBatch(
        [2.0, 0.0], {"judge": [0.5, None], "numeric_answer": [1.0, 0.0]}, {"timeout": 1, "judge": 1}
    )
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
