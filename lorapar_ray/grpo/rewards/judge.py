"""The reward `judge`: the labelling teachers grade completions.

A grade is one constrained token, and the reward is the expected grade under the teacher's probabilities, so that even a
small teacher's weak preference ranks the completions of a group. A teacher's constant bias cancels in the group's
advantages. The judge runs in its own actor, separate from the reward workers: it executes no foreign code, and each
question to a teacher has a time limit. A completion may try to persuade its judge; combine the judge with a verifiable
reward if possible.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from typing import Any

from lorapar_ray.config import JUDGE, Config, JudgeConfig, LabelConfig, VotePrompt
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.rewards.pool import RewardBatch, with_part
from lorapar_ray.labeling.panel import reasons
from lorapar_ray.labeling.secrets import secrets, warn_of_plain_http
from lorapar_ray.labeling.serving import start_teachers, stop_teachers
from lorapar_ray.labeling.teachers import Asked, Teacher, connect, persist
from lorapar_ray.labeling.time_limit import time_limit
from lorapar_ray.labeling.votes import normalised
from lorapar_ray.redact import remember, remember_config
from lorapar_ray.text import one_line, reason

LONGEST_ERROR = 400


@dataclass(frozen=True)
class Grades:
    """The grades of some completions."""

    values: list[float | None]
    """Each in [0, 1]; None where no teacher gave one."""
    error: str = ""
    """Why the first completion without a grade has none, without secrets; "" if all have one."""

    def added_to(self, scored: RewardBatch, weights: Mapping[str, float]) -> RewardBatch:
        """The batch with the reward `judge`; `weights` are those of all rewards, in the order of the parts."""
        return with_part(scored, JUDGE, weights[JUDGE], self.values, list(weights), self.error)


class Judge:
    """Teachers that grade, connected; lives in one event loop."""

    def __init__(
        self, settings: dict[str, Any], label: dict[str, Any], apps: Mapping[str, str], keys: Mapping[str, str]
    ) -> None:
        """Take a JudgeConfig, the LabelConfig of its teachers (both as JSON), and what `connect` needs."""
        self._settings = JudgeConfig.model_validate(settings)
        self._label = LabelConfig.model_validate(label)
        remember(keys.values())  # the judge's process does not read the config's file
        remember_config(label)
        found = {teacher.name: connect(self._label, teacher, apps, keys) for teacher in self._label.teachers}
        self._teachers = {name: teacher for name, teacher in found.items() if teacher is not None}
        self._choices = [str(grade) for grade in range(1, self._settings.grades + 1)]

    async def grades(self, questions: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> Grades:
        """Mean grade of each completion in [0, 1] over the teachers that answered; None where none did."""
        every = zip(questions, completions, answers, strict=True)
        found = await asyncio.gather(*(self._grade(*each) for each in every))
        errors = [f"no teacher graded it: {each}" for each in found if isinstance(each, str)]
        return Grades([None if isinstance(each, str) else each for each in found], errors[0] if errors else "")

    async def _grade(self, question: str, completion: str, answer: str) -> float | str:
        """The mean grade, or the reason of each teacher that gave none."""
        grades = self._settings.grades
        text = self._settings.prompt.format(question=question, answer=answer, completion=completion, grades=grades)
        prompt = f"{text}\n{self._settings.choice}"
        asked = await asyncio.gather(*(self._ask(teacher, prompt) for teacher in self._teachers.values()))
        given = [grade for grade in asked if not isinstance(grade, str)]
        if given:
            return sum(given) / len(given)
        return one_line(
            "; ".join(f"{name}: {why}" for name, why in zip(self._teachers, asked, strict=True)), LONGEST_ERROR
        )

    async def _ask(self, teacher: Teacher, prompt: str) -> float | str:
        """A teacher's grade, or why it gave none."""
        last, limit = "", self._settings.time_limit_s

        async def attempt() -> Asked:
            nonlocal last
            try:
                return await teacher.ask(prompt, self._choices)
            except Exception as error:
                last = f"; the attempt before: {reason(error)}"
                raise

        try:
            async with time_limit(limit) as scope:
                asked = await persist(attempt, self._label)
                return expected_grade(asked.log_probs)
        except Exception as error:  # a failed teacher gives no grade; failures are counted
            if isinstance(error, TimeoutError) and scope.expired():
                return f"it takes longer than grpo.judge.time_limit_s ({limit:g}){last}"
            return reason(error)


def expected_grade(log_probs: Sequence[float]) -> float:
    """Mean of the grades 0, 1/(K−1), …, 1 under the log-probabilities of K grades, up to a common constant."""
    shares = [exp(value) for value in normalised(log_probs)]
    return sum(share * grade for grade, share in enumerate(shares)) / (len(shares) - 1)


@contextmanager
def judging(config: Config, actors: int = 1) -> Iterator[dict[str, Any] | None]:
    """Host the judge's teachers while the block runs; yields the arguments of `Judge`, or None without a judge.

    Args:
        actors: judges at work, which share each teacher's rate limit.

    Raises:
        UserError: none of them runs.
    """
    if not config.grpo.judged:
        yield None
        return
    settings, teachers = config.grpo.judge, config.judges
    own = {"strategy": "vote", "quorum": 1, "workers": actors, "prompt": VotePrompt(choice=settings.choice)}
    label = config.label.model_copy(update={**own, "teachers": teachers, "timeout_s": settings.time_limit_s})
    panel = config.model_copy(update={"name": f"{config.name}-judge", "label": label})
    keys = secrets(teachers)
    warn_of_plain_http(teachers, keys)
    try:
        apps, failed = start_teachers(panel)
        if len(failed) == len(teachers):
            raise UserError(f"grpo.judge: no teacher runs ({reasons(failed)}); fix them and run the same command again")
        yield {
            "settings": settings.model_dump(mode="json"),
            "label": label.model_dump(mode="json"),
            "apps": apps,
            "keys": keys,
        }
    finally:
        stop_teachers(panel)
