"""Signal or noise: do the two Systems differ more than two random halves of the same System?

Each half's scores come from half of a System's examples, so every pair compared here is equally noisy. If the two
Systems' halves agree with each other as well as halves of one System do, the partition separates noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorapar_ray.importance.halves import Halves
from lorapar_ray.partition.blocks import same_layout
from lorapar_ray.partition.sampling import gather, spread
from lorapar_ray.partition.select import keep_top

RANKED_AT_MOST = 4_000_000
"""Elements ranked for Spearman's correlation; a larger adapter is sampled, the same elements in all four halves."""


def half_control(
    scores_1a: Mapping[str, Tensor],
    scores_1b: Mapping[str, Tensor],
    scores_2a: Mapping[str, Tensor],
    scores_2b: Mapping[str, Tensor],
    *,
    theta: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Agreement within and across Systems of scores (float32) from random halves of each System's examples.

    Returns:
        "jaccard" (of the sets kept at θ) and "spearman" (of the scores' ranks), each with "system1" and "system2"
        (between the System's own halves) and "across" (mean of the four pairs of one half of each System); and
        "warning", a sentence if by either measure the Systems agree at least as well as the halves, else None.

    Raises:
        UserError: as `keep_top`, or the halves are not of one adapter.
    """
    halves = (scores_1a, scores_1b, scores_2a, scores_2b)
    for other in halves[1:]:
        same_layout(scores_1a, other, "scores of the halves")
    kept = [keep_top(scores, theta) for scores in halves]
    positions = spread(sum(s.numel() for s in scores_1a.values()), RANKED_AT_MOST, seed)
    ranked = [average_ranks(gather(scores, positions)) for scores in halves]
    agreement = {"jaccard": _pairs(kept, jaccard), "spearman": _pairs(ranked, correlation)}
    drowned = [
        f"{name} {pairs['across']:.3f} across Systems, {(pairs['system1'] + pairs['system2']) / 2:.3f} between halves"
        for name, pairs in agreement.items()
        if pairs["across"] >= (pairs["system1"] + pairs["system2"]) / 2
    ]
    warning = None
    if drowned:
        warning = (
            f"the Systems differ no more than random halves of one System do ({'; '.join(drowned)}): "
            "score more examples, or expect the partition to be close to a random one"
        )
    return {**agreement, "warning": warning}


def control_curve(points: Iterable[Halves], *, theta: float, seed: int = 0) -> list[dict[str, Any]]:
    """The results of `half_control` at growing numbers of examples, with "examples" ([System 1's, System 2's]).

    Args:
        points: scores of the halves (see `importance.halves`); none where a System has fewer than two units.
    """
    return [
        {"examples": list(point.examples), **half_control(*point.scores, theta=theta, seed=seed)} for point in points
    ]


def control_of_systems(point: Halves, *, theta: float, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The results of `half_control` for each two of any number of Systems, such as "1-3"; there "system1" and "system2"
    are the first and the second of the two."""
    own = [point.scores[2 * system : 2 * system + 2] for system in range(len(point.examples))]
    return {
        f"{one + 1}-{two + 1}": half_control(*own[one], *own[two], theta=theta, seed=seed)
        for one, two in combinations(range(len(own)), 2)
    }


def jaccard(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """|first ∩ second| / |first ∪ second| of bool masks; 1 for two empty sets."""
    both = sum(int((first[key] & second[key]).sum()) for key in first)
    either = sum(int((first[key] | second[key]).sum()) for key in first)
    return both / either if either else 1.0


def average_ranks(values: Tensor) -> Tensor:
    """float64 ranks (1-D, from 1) of a 1-D tensor, ties sharing their mean rank."""
    order = np.argsort(values.numpy())
    ascending = values.numpy()[order]
    starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))
    sizes = np.diff(starts, append=len(ascending))
    ranks = np.empty(len(ascending))
    ranks[order] = np.repeat(starts + (sizes + 1) / 2, sizes)
    return torch.from_numpy(ranks)


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two 1-D float64 tensors (of ranks: Spearman's); 0 where either is constant."""
    x, y = first - first.mean(), second - second.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else 0.0


def _pairs(halves: list[Any], agreement: Callable[[Any, Any], float]) -> dict[str, float]:
    across = [agreement(one, two) for one, two in product(halves[:2], halves[2:])]
    return {
        "system1": agreement(halves[0], halves[1]),
        "system2": agreement(halves[2], halves[3]),
        "across": sum(across) / len(across),
    }
