"""Turns stored answers into votes, and chooses the next teachers to ask; pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.labeling.store import Answer
from lorapar_ray.labeling.votes import Vote, balanced, calibrated, fewest_to_decide, lead

Keys = Mapping[str, Sequence[bytes]]
"""The cache keys of each teacher, one per rotation of the prompt."""


def asking_order(teachers: Sequence[TeacherConfig]) -> list[TeacherConfig]:
    """Sorted by price, cheapest first: price of a token, then of an hour, then the given order."""
    return sorted(teachers, key=lambda teacher: (teacher.cost_per_million_tokens, teacher.cost_per_hour))


def vote_of(teacher: str, answers: Sequence[Answer], bias: Sequence[float] | None) -> Vote:
    """A teacher's vote: its answers balanced over the rotations, its bias divided out.

    Systems are numbered 1 to K in the order of the log-probabilities; the lower one wins a tie.
    """
    log_probs = balanced([answer.log_probs for answer in answers])
    shares = calibrated(log_probs, bias or [0.0] * len(log_probs))
    best = max(range(len(shares)), key=shares.__getitem__)
    return Vote(teacher, best + 1, shares[best], sum(answer.latency_s for answer in answers))


def votes_of(
    label: LabelConfig, keys: Keys, found: Mapping[bytes, Answer], bias: Mapping[str, Sequence[float]]
) -> list[Vote]:
    """The votes from a question's stored answers, in the teachers' order."""
    return [
        vote_of(teacher.name, [found[key] for key in keys[teacher.name]], bias.get(teacher.name))
        for teacher in label.teachers
        if all(key in found for key in keys[teacher.name])
    ]


def whom_to_ask(label: LabelConfig, votes: Sequence[Vote], available: Sequence[str]) -> list[str]:
    """The teachers to ask now: all that have not voted, or with `sequential` as few as could decide the question.

    Args:
        votes: cast so far.
        available: names of the teachers that have neither voted nor abstained.
    """
    waiting = [teacher.name for teacher in asking_order(label.teachers) if teacher.name in available]
    if not label.sequential:
        return waiting
    return waiting[: fewest_to_decide(lead(votes, label.weights), len(waiting))]
