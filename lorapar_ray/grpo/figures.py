"""A step's metrics from those of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def as_numbers(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars on a device as numbers, fetched at once."""
    return dict(zip(figures, torch.stack([each.float() for each in figures.values()]).tolist(), strict=True))


def step_metrics(parts: list[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Metrics of a step from those of its parts, each with its number of sequences.

    `loss` and `updates_skipped` add up, `..._max` and `..._min` are extremes, the others means over the sequences of
    parts that have them.
    """
    found: dict[str, float] = {}
    for key in {key: None for metrics, _ in parts for key in metrics}:
        values = [(metrics[key], count) for metrics, count in parts if key in metrics]
        if key in ("loss", "updates_skipped"):
            found[key] = sum(value for value, _ in values)
        elif key.endswith(("_max", "_min")):
            found[key] = (max if key.endswith("_max") else min)(value for value, _ in values)
        else:
            found[key] = sum(value * count for value, count in values) / sum(count for _, count in values)
    return found


def from_all_ranks(parts: list[Any], world: int) -> list[Any]:
    """The parts of every rank, in order of rank."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, parts)
    return [part for each in gathered for part in each]
