"""Right or wrong per question, and what that says about the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import sqrt
from typing import Any

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(correct: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): sound for small n and for shares near 0 or 1.

    Raises:
        ValueError: n < 1, or correct outside 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"need 0 <= correct <= n and n >= 1, got {correct} of {n}")
    share = correct / n
    centre = share + z * z / (2 * n)
    spread = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def accuracy(right: Sequence[bool], tasks: Sequence[str]) -> dict[str, Any]:
    """{n, correct, accuracy, interval, by_task} of one model's answers, JSON-ready.

    Args:
        right: whether each question was answered correctly.
        tasks: the task of each question.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    for task, ok in zip(tasks, right, strict=True):
        groups[task].append(ok)
    return _count(right) | {"by_task": {task: _count(oks) for task, oks in sorted(groups.items())}}


def _count(right: Sequence[bool]) -> dict[str, Any]:
    n, correct = len(right), sum(right)
    return {"n": n, "correct": correct, "accuracy": correct / n, "interval": list(wilson_interval(correct, n))}
