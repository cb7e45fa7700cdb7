"""A teacher without a model, for sizing a job and testing throughput: fixed latency, known accuracy.

    teachers:
      - {name: a, kind: python, model: "lorapar_ray.labeling.simulated:SimulatedTeacher",
         extra_body: {latency_s: 0.2, accuracy: 0.8}}

A question's true System is its digest's parity (`true_system`), which no prompt shows.
"""

from __future__ import annotations

import asyncio
from hashlib import blake2b
from math import log

from lorapar_ray.config import TeacherConfig
from lorapar_ray.labeling.teachers import Asked

TOKENS = 1


def true_system(question: str, answer: str) -> int:
    """1 or 2, evenly spread and the same everywhere."""
    return 1 + blake2b(f"{question}\0{answer}".encode()).digest()[0] % 2


class SimulatedTeacher:
    """Answers after `latency_s` (default 0), right with probability `accuracy` (default 1), seeded by its name."""

    def __init__(self, teacher: TeacherConfig) -> None:
        self._name = teacher.name
        self._latency_s = float(teacher.extra_body.get("latency_s", 0.0))
        self._accuracy = float(teacher.extra_body.get("accuracy", 1.0))

    async def ask(self, prompt: str, choices: list[str]) -> Asked:
        """Log-odds of two for a right choice or a wrong one; the prompt must be the default one."""
        await asyncio.sleep(self._latency_s)
        question, answer = asked_about(prompt)
        digest = blake2b(f"{self._name}\0{question}".encode(), digest_size=8).digest()
        draw = int.from_bytes(digest) / 2**64
        right = true_system(question, answer)
        chosen = right if draw < self._accuracy else 3 - right
        return Asked([log(0.88 if int(choice) == chosen else 0.12) for choice in choices], TOKENS, self._latency_s)


def asked_about(prompt: str) -> tuple[str, str]:
    """The question and the answer in a default voting prompt."""
    question, _, rest = prompt.rpartition("Question: ")[2].rpartition("\nAnswer: ")
    return question, rest.removesuffix("\nSystem:")
