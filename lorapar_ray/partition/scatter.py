"""A sample of elements as points (importance to System 1, importance to System 2), coloured by region in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.partition.blocks import same_layout
from lorapar_ray.partition.regions import SHARED
from lorapar_ray.partition.sampling import gather, spread

REGION_NAMES = ("none", "system1_only", "system2_only", "shared")
"""Named by bits 0 and 1 of a region byte."""

_SMALLEST = 2.0**-149  # float32's smallest positive value: a score of zero is drawn here on a logarithmic axis


def scatter_sample(
    scores1: Mapping[str, Tensor],
    scores2: Mapping[str, Tensor],
    regions: Mapping[str, Tensor],
    n: int = 6000,
    seed: int = 0,
) -> dict[str, list[Any]]:
    """At most `n` elements as equally long lists: log10 importances "system1" and "system2", and "region" names.

    Each of the four regions gives up to n/4 elements, spread over the whole adapter, so that a small region stays
    visible; density can be compared within a region, not between regions.

    Raises:
        UserError: scores and regions are not of one adapter.
    """
    same_layout(scores1, scores2, "scores of the two Systems")
    same_layout(scores1, regions, "scores and regions")
    points: dict[str, list[Any]] = {"system1": [], "system2": [], "region": []}
    for code, name in enumerate(REGION_NAMES):
        inside = {key: (region & SHARED) == code for key, region in regions.items()}
        chosen = spread(sum(int(mask.sum()) for mask in inside.values()), n // len(REGION_NAMES), seed + code)
        for axis, scores in (("system1", scores1), ("system2", scores2)):
            sample = gather({key: scores[key][inside[key]] for key in scores}, chosen)
            points[axis] += _log10(sample)
        points["region"] += [name] * len(chosen)
    return points


def _log10(values: Tensor) -> list[float]:
    return [math.log10(value or _SMALLEST) for value in values.to(torch.float64).tolist()]
