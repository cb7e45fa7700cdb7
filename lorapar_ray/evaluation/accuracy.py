"""Accuracy of a model from right or wrong answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lorapar_ray.evaluation.statistics import wilson_interval


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
