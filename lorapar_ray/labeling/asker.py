"""The Ray Data worker that asks: one handle per teacher, all questions of a block in flight, failures abstain."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.labeling.prompts import voting_prompt
from lorapar_ray.labeling.teachers import RemoteTeacher
from lorapar_ray.labeling.votes import Vote, average_log_probs, calibrated, decided
from lorapar_ray.runs import write_json

BACKOFF_S = 1.0


class Asker:
    """Collects votes block by block; a block's votes appear on disk whole or not at all."""

    def __init__(self, label: dict[str, Any], apps: dict[str, str], student: str | None, bias: dict[str, list[float]]):
        """Take the Serve application of each hosted teacher that runs (`apps`, others abstain), the student's name, and
        by teacher the log-probabilities to divide out (`bias`)."""
        self._config = LabelConfig.model_validate(label)
        self._student = student
        self._bias = bias
        self._systems = sorted(self._config.definitions)
        self._teachers = {
            teacher.name: _connect(teacher, apps)
            for teacher in self._config.teachers
            if teacher.kind == "remote" or teacher.name in apps
        }
        self._slots = asyncio.Semaphore(self._config.concurrency)

    async def __call__(self, batch: dict[str, Any]) -> Any:
        """Ask every question of each block in `batch["block"]` (paths of `block-NNNNN` without suffix)."""
        for stem in batch["block"]:
            rows = json.loads(Path(f"{stem}.json").read_text())
            votes = await asyncio.gather(*(self.votes(row["prompt"], row["answer"]) for row in rows))
            result = [{"id": row["id"], "votes": found} for row, found in zip(rows, votes, strict=True)]
            write_json(Path(f"{stem}.votes.json"), result)
        yield {"block": batch["block"]}

    async def votes(self, question: str, answer: str) -> list[dict[str, Any]]:
        """The votes of all teachers that answered, in the teachers' order."""
        async with self._slots:
            if self._config.sequential:
                found: list[Vote] = []
                for asked, teacher in enumerate(self._config.teachers, start=1):
                    if (vote := await self._vote(teacher, question, answer)) is not None:
                        found.append(vote)
                    if decided(found, len(self._config.teachers) - asked):
                        break
            else:
                answers = await asyncio.gather(*(self._vote(t, question, answer) for t in self._config.teachers))
                found = [vote for vote in answers if vote is not None]
        return [vars(vote) for vote in found]

    async def _vote(self, teacher: TeacherConfig, question: str, answer: str) -> Vote | None:
        start = time.monotonic()
        log_probs = await self.log_probs(teacher, question, answer)
        if log_probs is None:
            return None
        bias = self._bias.get(teacher.name, [0.0] * len(self._systems))
        shares = calibrated(log_probs, bias)
        best = max(range(len(shares)), key=shares.__getitem__)
        return Vote(teacher.name, self._systems[best], shares[best], time.monotonic() - start)

    async def log_probs(self, teacher: TeacherConfig, question: str, answer: str) -> list[float] | None:
        """Uncalibrated log-probabilities of the Systems; None if the teacher fails after its retries."""
        if teacher.name not in self._teachers:
            return None
        orders = [self._systems]
        if self._config.calibration == "swapped_definitions":
            orders.append(self._systems[::-1])
        asked = [await self._ask(teacher, question, answer, order) for order in orders]
        return None if any(each is None for each in asked) else average_log_probs([each for each in asked if each])

    async def _ask(self, teacher: TeacherConfig, question: str, answer: str, order: list[int]) -> list[float] | None:
        examples = sorted(self._config.examples, key=lambda example: order.index(example.system))
        prompt = voting_prompt(
            question,
            answer,
            definitions={system: self._config.definitions[system] for system in order},
            examples=examples if teacher.example_order == "system1_first" else examples[::-1],
            student=self._student if self._config.strategy != "single" else None,
        )
        choices = [str(system) for system in self._systems]
        for attempt in range(self._config.retries + 1):
            try:
                asked = self._teachers[teacher.name](prompt, choices)
                return list(await asyncio.wait_for(asked, self._config.timeout_s))
            except Exception:  # whatever breaks in a teacher, its vote abstains and the summary counts it
                await asyncio.sleep(BACKOFF_S * 2**attempt if attempt < self._config.retries else 0)
        return None


def _connect(teacher: TeacherConfig, apps: dict[str, str]) -> Any:
    """An async function (prompt, choices) -> log-probabilities."""
    if teacher.kind == "remote":
        return RemoteTeacher(teacher).ask
    from ray import serve

    handle = serve.get_deployment_handle(teacher.name, apps[teacher.name])

    async def ask(prompt: str, choices: list[str]) -> list[float]:
        answer: list[float] = await handle.ask.remote(prompt, choices)
        return answer

    return ask


def read_votes(stem: Path) -> list[dict[str, Any]]:
    """What `Asker` left for a block."""
    votes: list[dict[str, Any]] = json.loads(Path(f"{stem}.votes.json").read_text())
    return votes


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as one Parquet file."""
    pq.write_table(pa.Table.from_pylist(rows), path)
