"""A step's metrics from those of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from statistics import fmean
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The metrics of a pass or of an update, and the number of its samples and of their sampled tokens."""

    metrics: dict[str, float]
    samples: int
    tokens: int


def as_numbers(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars on a device as numbers, fetched at once."""
    return dict(zip(figures, torch.stack([each.float() for each in figures.values()]).tolist(), strict=True))


def update_metrics(parts: Sequence[Part]) -> dict[str, float]:
    """Metrics of an update from those of its passes, whose losses add up."""
    return _joined(parts, sum)


def step_metrics(updates: Sequence[Part]) -> dict[str, float]:
    """Metrics of a step from those of its updates; the loss is their mean."""
    return _joined(updates, fmean)


def _joined(parts: Sequence[Part], loss_of: Callable[[Sequence[float]], float]) -> dict[str, float]:
    """`updates_skipped` adds up, `..._max` and `..._min` are extremes, `grad_norm` is the mean over parts,
    `sequence_masked_share` the mean over samples, and the others are means over tokens, each of the parts that have
    them."""
    found: dict[str, float] = {}
    for key in {key: None for part in parts for key in part.metrics}:
        own = [part for part in parts if key in part.metrics]
        values = [part.metrics[key] for part in own]
        if key == "loss":
            found[key] = loss_of(values)
        elif key == "updates_skipped":
            found[key] = sum(values)
        elif key.endswith(("_max", "_min")):
            found[key] = (max if key.endswith("_max") else min)(values)
        elif key == "grad_norm":
            found[key] = fmean(values)
        else:
            weights = [part.samples if key == "sequence_masked_share" else part.tokens for part in own]
            found[key] = sum(map(mul, values, weights)) / max(1, sum(weights))
    return found


def from_all_ranks(parts: list[Any], world: int) -> list[Any]:
    """The parts of every rank, in order of rank."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, parts)
    return [part for each in gathered for part in each]
