"""The teachers of one process, asked one question at a time: retries, abstentions, and giving up on a dead teacher."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.labeling.prompts import numbers, prompt_opening, question_block, rotations
from lorapar_ray.labeling.store import Answer
from lorapar_ray.labeling.teachers import Asked, Refused, ShutOut, Teacher, connect, persist
from lorapar_ray.labeling.votes import normalised
from lorapar_ray.redact import remember, remember_config
from lorapar_ray.text import one_line, reason

MOST_TOKENS = 10**9
"""Most tokens that an answer may report."""


@dataclass(frozen=True)
class Failure:
    """Why a teacher abstains from a question."""

    reason: str
    by_question: bool = False
    """The teacher refuses only this question: it is healthy."""


class Panel:
    """Every teacher of the config, connected, with its health."""

    def __init__(
        self,
        label: LabelConfig,
        apps: Mapping[str, str],
        keys: Mapping[str, str],
        student: str,
        run: str = "",
        dead: Mapping[str, str] | None = None,
    ) -> None:
        """Connect.

        Args:
            apps: Serve application of each hosted teacher that runs; others abstain.
            keys: secret of each remote teacher that has one.
            student: the model they play.
            run: written into every answer, see `Answer.run`.
            dead: teachers not to ask, and why.
        """
        self._label = label
        self._run = run
        remember(keys.values())  # a worker does not read the config's file
        remember_config(label.model_dump(mode="json"))
        self._teachers: dict[str, Teacher | None] = {t.name: connect(label, t, apps, keys) for t in label.teachers}
        self._openings = {
            t.name: [prompt_opening(label, t, student, r) for r in rotations(label)] for t in label.teachers
        }
        self._choices = [str(system) for system in sorted(label.definitions)]
        self._failed_in_a_row = dict.fromkeys(self._teachers, 0)
        absent = {name: "it could not start" for name, teacher in self._teachers.items() if teacher is None}
        self.dead = absent | dict(dead or {})
        """Teachers given up, and why."""

    @property
    def quorum_lost(self) -> bool:
        return len(self._teachers) - len(self.dead) < self._label.quorum

    async def ask(self, teacher: TeacherConfig, question: str, answer: str) -> list[Answer] | Failure:
        """The teacher's answers, one per rotation; or the reason of the failure after all retries."""
        ways = self._openings[teacher.name]
        if len(ways) == 1:  # no asyncio task for a single call: a vote without an engine takes tens of microseconds
            asked = [await self._ask(teacher, question, answer, 0)]
        else:
            asked = await asyncio.gather(*(self._ask(teacher, question, answer, r) for r in range(len(ways))))
        good = [each for each in asked if isinstance(each, Answer)]
        if len(good) == len(asked):
            self._failed_in_a_row[teacher.name] = 0
            return good
        failure = next(each for each in asked if isinstance(each, Failure))
        if teacher.name not in self.dead and not failure.by_question:
            self._failed_in_a_row[teacher.name] += 1
            if self._failed_in_a_row[teacher.name] >= self._label.give_up_after:
                self.dead[teacher.name] = f"{self._label.give_up_after} failures in a row, the last: {failure.reason}"
        return failure

    async def _ask(self, teacher: TeacherConfig, question: str, answer: str, rotation: int) -> Answer | Failure:
        label = self._label
        prompt = self._openings[teacher.name][rotation] + question_block(label, question, answer)
        own_numbers = numbers(label, rotation)
        voter = self._teachers[teacher.name]
        if voter is None or self._given_up(teacher):
            return Failure(self.dead[teacher.name])

        async def vote() -> Answer:
            asked = checked(await voter.ask(prompt, self._choices), len(self._choices))
            by_number = normalised(asked.log_probs)
            by_system = [by_number[number - 1] for number in own_numbers]
            return Answer(by_system, asked.tokens, asked.latency_s, self._run)

        try:
            return await persist(vote, label, lambda: self._given_up(teacher))
        except Refused as error:
            return Failure(reason(error), by_question=not isinstance(error, ShutOut))
        except Exception as error:  # a teacher that fails abstains, and the summary counts it
            return Failure(self.dead.get(teacher.name) or reason(error))

    def _given_up(self, teacher: TeacherConfig) -> bool:
        return teacher.name in self.dead


def reasons(dead: Mapping[str, str]) -> str:
    """Why each teacher was given up, in short."""
    return "; ".join(f"{name}: {one_line(why, 100)}" for name, why in dead.items())


def checked(asked: Asked, choices: int) -> Asked:
    """A checked answer: teachers are foreign code, and their endpoints foreign machines.

    Raises:
        ValueError: the number of log-probabilities is not the number of choices, or the token count or the latency is
            invalid.
    """
    if len(asked.log_probs) != choices:
        raise ValueError(f"{len(asked.log_probs)} log-probabilities for {choices} choices")
    if not isinstance(asked.tokens, int) or not 0 <= asked.tokens <= MOST_TOKENS:
        raise ValueError(f"a token count of {one_line(asked.tokens, 40)}")
    if not 0 <= asked.latency_s < math.inf:
        raise ValueError(f"a latency of {asked.latency_s} s")
    return Asked([float(value) for value in asked.log_probs], asked.tokens, float(asked.latency_s))
