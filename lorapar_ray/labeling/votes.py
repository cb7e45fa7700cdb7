"""Votes and what follows from them; pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, exp, log


@dataclass(frozen=True)
class Vote:
    """One teacher's choice; a teacher that abstains has none."""

    teacher: str
    system: int
    confidence: float
    """Calibrated probability of the choice."""
    latency_s: float


@dataclass(frozen=True)
class Decision:
    """The label of a question."""

    system: int
    agreement: float
    """Share of the votes for it."""
    confidence: float
    """Mean confidence of those votes."""


def calibrated(log_probs: Sequence[float], bias: Sequence[float]) -> list[float]:
    """Probabilities after the teacher's bias (its log-probabilities on content-free questions) is divided out."""
    shifted = [value - own for value, own in zip(log_probs, bias, strict=True)]
    top = max(shifted)
    weights = [exp(value - top) for value in shifted]
    return [weight / sum(weights) for weight in weights]


def average_log_probs(answers: Sequence[Sequence[float]]) -> list[float]:
    """Log of the mean probability of each choice over several askings."""
    return [log(sum(exp(answer[i]) for answer in answers) / len(answers)) for i in range(len(answers[0]))]


def majority(votes: Sequence[Vote]) -> Decision | None:
    """The System with most votes; a tie goes to the higher summed confidence, then to the lower number.

    None if nobody voted.
    """
    if not votes:
        return None
    count: dict[int, int] = defaultdict(int)
    weight: dict[int, float] = defaultdict(float)
    for vote in votes:
        count[vote.system] += 1
        weight[vote.system] += vote.confidence
    winner = max(count, key=lambda system: (count[system], weight[system], -system))
    return Decision(winner, count[winner] / len(votes), weight[winner] / count[winner])


def decided(votes: Sequence[Vote], remaining: int) -> bool:
    """Whether the votes still to come cannot change the majority."""
    count: dict[int, int] = defaultdict(int)
    for vote in votes:
        count[vote.system] += 1
    ranked = sorted(count.values(), reverse=True)
    lead = ranked[0] - (ranked[1] if len(ranked) > 1 else 0) if ranked else 0
    return lead > remaining


def pairwise_agreement(rows: Sequence[Sequence[Vote]]) -> dict[str, dict[str, float]]:
    """For each pair of teachers, the share of questions both voted on in which they chose the same System."""
    same: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for votes in rows:
        for one, other in combinations(sorted(votes, key=lambda vote: vote.teacher), 2):
            same[one.teacher, other.teacher].append(one.system == other.system)
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for (first, second), agreed in same.items():
        table[first][second] = table[second][first] = sum(agreed) / len(agreed)
    return {name: dict(sorted(table[name].items())) for name in sorted(table)}


def fleiss_kappa(rows: Sequence[Sequence[int]]) -> float | None:
    """Agreement beyond chance of a fixed number of raters (Fleiss 1971).

    Args:
        rows: for each question the Systems chosen; only questions with the most common number of votes are used.

    Returns:
        kappa, or None with fewer than two raters or when every vote is the same.
    """
    if not rows:
        return None
    raters = max(len(row) for row in rows)
    full = [row for row in rows if len(row) == raters]
    if raters < 2:
        return None
    systems = sorted({system for row in full for system in row})
    observed = sum(
        sum(row.count(system) * (row.count(system) - 1) for system in systems) / (raters * (raters - 1)) for row in full
    ) / len(full)
    shares = [sum(row.count(system) for row in full) / (raters * len(full)) for system in systems]
    chance = sum(share * share for share in shares)
    return None if chance == 1 else (observed - chance) / (1 - chance)


def binomial_majority_accuracy(p: float, n: int) -> float:
    """Probability that the majority of n independent teachers (n odd), each right with probability p, is right."""
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))
