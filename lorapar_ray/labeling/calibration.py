"""Measures each teacher's bias towards a System, so that it can be divided out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.datasets.rows import count_rows, iterate_rows
from lorapar_ray.labeling.panel import Failure, Panel
from lorapar_ray.labeling.prompts import CONTENT_FREE
from lorapar_ray.labeling.store import Answer, VoteStore, question_key
from lorapar_ray.labeling.votes import average_log_probs, balanced
from lorapar_ray.labeling.voting import Keys

Probe = tuple[str, str]
"""A question and its answer."""
ARE_YOU_THERE: Probe = (CONTENT_FREE[0], "N/A")


def probes(label: LabelConfig, rows: Path, seed: int) -> list[Probe]:
    """Questions that measure every teacher's bias, sent first; empty without calibration.

    For `batch` they are a sample of the questions themselves, whose votes are needed anyway.
    """
    if label.calibration == "content_free":
        return [(text, "N/A") for text in CONTENT_FREE]
    if label.calibration != "batch":
        return []
    count = count_rows(rows)
    drawn = random.Random(f"{seed}/bias").sample(range(count), min(count, label.calibration_rows))
    wanted = set(drawn)
    found = {i: (row.prompt, row.answer) for i, row in enumerate(iterate_rows(rows)) if i in wanted}
    return [found[index] for index in drawn]


def unanswered(label: LabelConfig, keys: Keys, store: VoteStore, asked: Sequence[Probe]) -> dict[str, list[Probe]]:
    """By teacher, the probes without a stored answer."""
    known = store.answers([question_key(*probe) for probe in asked])
    return {
        teacher.name: [
            probe
            for probe in asked
            if not all(key in known.get(question_key(*probe), {}) for key in keys[teacher.name])
        ]
        for teacher in label.teachers
    }


async def ask_probes(
    panel: Panel, label: LabelConfig, keys: Keys, store: VoteStore, asked: Sequence[Probe], ready: list[str]
) -> dict[str, str]:
    """Request the answers to `unanswered` and store them; returns the teachers that do not answer now, with reasons.

    A teacher that has answered some before also gets one question without content, to check whether it is available and
    only refuses the remaining ones. Each finished teacher is appended to `ready`.
    """
    waiting = unanswered(label, keys, store, asked)

    async def ask(teacher: TeacherConfig, probe: Probe) -> list[Answer] | Failure:
        outcome = await panel.ask(teacher, *probe)
        if not isinstance(outcome, Failure):
            question = question_key(*probe)
            store.add((question, key, answer) for key, answer in zip(keys[teacher.name], outcome, strict=True))
        return outcome

    async def one(teacher: TeacherConfig) -> str | None:
        own = waiting[teacher.name]
        if not own or len(own) < len(asked):
            own = [*own, ARE_YOU_THERE]
        outcomes = await asyncio.gather(*(ask(teacher, probe) for probe in own))
        ready.append(teacher.name)
        failed = [outcome.reason for outcome in outcomes if isinstance(outcome, Failure)]
        return failed[0] if len(failed) == len(outcomes) else None

    reasons = await asyncio.gather(*(one(teacher) for teacher in label.teachers))
    return {teacher.name: why for teacher, why in zip(label.teachers, reasons, strict=True) if why is not None}


def measured_bias(label: LabelConfig, keys: Keys, store: VoteStore, asked: Sequence[Probe]) -> dict[str, list[float]]:
    """By teacher the log-probabilities to divide out; empty without probes."""
    digests = [question_key(*probe) for probe in asked]
    known = store.answers(digests)
    bias: dict[str, list[float]] = {}
    for teacher in label.teachers:
        own = keys[teacher.name]
        complete: list[Mapping[bytes, Answer]] = [
            known[digest] for digest in digests if digest in known and all(key in known[digest] for key in own)
        ]
        answers = [balanced([found[key].log_probs for key in own]) for found in complete]
        if answers and label.calibration == "batch":
            bias[teacher.name] = [median(column) for column in zip(*answers, strict=True)]
        elif answers:
            bias[teacher.name] = average_log_probs(answers)
    return bias
