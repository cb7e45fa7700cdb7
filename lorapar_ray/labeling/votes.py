"""Counts votes; pure functions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, isinf, isnan, log
from typing import Literal

SMALLEST = -30.0
Pattern = tuple[tuple[int, int], ...]
"""(System, its number of votes) of one question, in order."""


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
    """Share of the votes (or of their weight) for it."""
    confidence: float
    """Mean confidence of those votes."""


def calibrated(log_probs: Sequence[float], bias: Sequence[float]) -> list[float]:
    """Probabilities after dividing out the teacher's bias (its log-probabilities on content-free questions)."""
    shifted = [value - own for value, own in zip(log_probs, bias, strict=True)]
    top = max(shifted)
    weights = [exp(value - top) for value in shifted]
    return [weight / sum(weights) for weight in weights]


def average_log_probs(answers: Sequence[Sequence[float]]) -> list[float]:
    """Log of the mean probability of each choice over several askings."""
    return [log(sum(exp(answer[i]) for answer in answers) / len(answers)) for i in range(len(answers[0]))]


def normalised(log_probs: Sequence[float]) -> list[float]:
    """The same odds as log-probabilities that sum to one; a choice is never less likely than e^-30 of the best.

    Raises:
        ValueError: a number is NaN or +infinity.
    """
    top = max(log_probs)
    if any(isnan(value) for value in log_probs) or isinf(top):
        raise ValueError(f"log-probabilities {list(log_probs)} are not numbers")
    floored = [max(value - top, SMALLEST) for value in log_probs]
    total = log(sum(exp(value) for value in floored))
    return [value - total for value in floored]


def balanced(rotated: Sequence[Sequence[float]]) -> list[float]:
    """Mean log-probability of each System over prompts in which it has each number once.

    A bias towards a number adds the same to every System's sum, so it cancels in the odds.
    """
    return [sum(answer[i] for answer in rotated) / len(rotated) for i in range(len(rotated[0]))]


def number_bias(rotated: Sequence[Sequence[float]]) -> list[float]:
    """A teacher's mean log-probability of each number (not System), over all meanings of the number.

    Args:
        rotated: log-probabilities by System of the prompts with rotation 0, 1, ... K-1.
    """
    count = len(rotated)
    return [sum(rotated[r][(number - r) % count] for r in range(count)) / count for number in range(count)]


def majority(votes: Sequence[Vote], weights: Literal["equal", "confidence"] = "equal") -> Decision | None:
    """The System with most votes, or with most confidence if votes are weighted by it.

    A tie goes to the higher summed confidence, then to the lower number. None without a vote.
    """
    if not votes:
        return None
    count: dict[int, int] = defaultdict(int)
    sure: dict[int, float] = defaultdict(float)
    for vote in votes:
        count[vote.system] += 1
        sure[vote.system] += vote.confidence
    weight: Mapping[int, float] = count if weights == "equal" else sure
    winner = max(count, key=lambda system: (weight[system], sure[system], -system))
    return Decision(winner, weight[winner] / sum(weight.values()), sure[winner] / count[winner])


def lead(votes: Sequence[Vote], weights: Literal["equal", "confidence"] = "equal") -> float:
    """The lead of the first System over the second."""
    weight: dict[int, float] = defaultdict(float)
    for vote in votes:
        weight[vote.system] += 1.0 if weights == "equal" else vote.confidence
    first, second = (*sorted(weight.values(), reverse=True), 0.0, 0.0)[:2]
    return first - second


def fewest_to_decide(ahead: float, remaining: int) -> int:
    """The smallest number of remaining votes that could decide, if all of them went to the leader; 0: decided.

    A vote weighs at most 1, and a tie is not decided. Asking this many at once wastes no request.
    """
    asked = 0
    while asked < remaining and ahead + asked <= remaining - asked:
        asked += 1
    return asked


class Agreement:
    """Agreement of teachers, summed row by row: memory grows with the teachers, not with the rows."""

    def __init__(self) -> None:
        self._same: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self._patterns: Counter[Pattern] = Counter()

    def add(self, votes: Sequence[Vote]) -> None:
        for one, other in combinations(sorted(votes, key=lambda vote: vote.teacher), 2):
            pair = self._same[one.teacher, other.teacher]
            pair[0] += one.system == other.system
            pair[1] += 1
        self._patterns[tuple(sorted(Counter(vote.system for vote in votes).items()))] += 1

    def pairwise(self) -> dict[str, dict[str, float]]:
        """For each pair of teachers, the share of questions both voted on in which they chose the same System."""
        table: dict[str, dict[str, float]] = defaultdict(dict)
        for (first, second), (same, both) in self._same.items():
            table[first][second] = table[second][first] = same / both
        return {name: dict(sorted(table[name].items())) for name in sorted(table)}

    def fleiss_kappa(self) -> float | None:
        """Agreement beyond chance of a fixed number of raters (Fleiss 1971).

        Only questions with the most common number of votes are used. None with fewer than two raters or when every
        vote is the same.
        """
        sizes: Counter[int] = Counter()
        for pattern, rows in self._patterns.items():
            sizes[sum(count for _, count in pattern)] += rows
        if not sizes:
            return None
        raters = max(sizes, key=lambda size: (sizes[size], size))
        if raters < 2:
            return None
        full = {p: n for p, n in self._patterns.items() if sum(count for _, count in p) == raters}
        rows = sum(full.values())
        agreeing, shares = 0.0, Counter[int]()
        for pattern, n in full.items():
            for system, count in pattern:
                agreeing += n * count * (count - 1)
                shares[system] += n * count
        observed = agreeing / (raters * (raters - 1) * rows)
        chance = sum((count / (raters * rows)) ** 2 for count in shares.values())
        return None if chance == 1 else (observed - chance) / (1 - chance)
