"""Regions of any number of Systems that train one after the other: the elements that each may change.

Each System keeps its smallest top set by θ, as with two Systems. `own` regions are these sets, which overlap. In
`disjoint` regions an element that several Systems keep goes to the one for which it is most important, by its share of
that System's whole importance, I_k(φ) / ΣI_k; of equal shares, to the lower number. Importance itself would favour the
System with the larger losses. θ cuts the same shares, so no other disjoint regions within the kept sets hold more of
them, summed over the Systems.

On disk: one int16 per element, whose bit k − 1 tells whether System k trains it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorapar_ray.boundary import read_tensors
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path
from lorapar_ray.partition.blocks import same_layout
from lorapar_ray.partition.control import jaccard
from lorapar_ray.partition.passes import WHOLE_ADAPTER, GroupOf, count_scores, whole_adapter
from lorapar_ray.partition.select import keep_top, random_disjoint, random_mask

FILE, SUMMARY = "systems.safetensors", "systems.json"
RECUT = "run `lorapar partition` to write it again"
Tensors = Mapping[str, Tensor]
Masks = dict[str, Tensor]


def cut_systems(
    scores: Mapping[int, Tensors],
    theta: float,
    *,
    regions: Literal["own", "disjoint"],
    random: bool = False,
    group_of: GroupOf | None = None,
    seed: int = 0,
) -> tuple[dict[int, Masks], dict[str, Any]]:
    """Each System's region, as bool masks with the keys and shapes of its `scores` (float32); and a summary.

    Args:
        random: random sets of the same sizes, disjoint if `regions` are.

    Returns:
        masks by System; and, JSON-ready, "theta", "regions", "mask", the number of "elements", for each of "systems"
        the number of "elements" of its region, their "share", and the share of its "importance" that they hold, and
        under "jaccard" the overlap of the kept sets of each two Systems, such as "1-2".

    Raises:
        UserError: as `keep_top`, or the scores are not of one adapter.
    """
    systems = sorted(scores)
    for system in systems[1:]:
        same_layout(scores[systems[0]], scores[system], f"scores of System {systems[0]} and System {system}")
    kept = {system: keep_top(scores[system], theta, group_of) for system in systems}
    masks = disjoint(kept, scores) if regions == "disjoint" else kept
    if random:
        counts = [count_of(masks[system]) for system in systems]
        drawn = random_disjoint if regions == "disjoint" else random_each
        masks = dict(zip(systems, drawn(scores[systems[0]], counts, seed), strict=True))
    total = sum(tensor.numel() for tensor in scores[systems[0]].values())
    summary = {
        "theta": theta,
        "regions": regions,
        "mask": "random" if random else "importance",
        "elements": total,
        "systems": {
            str(system): {
                "elements": (count := count_of(masks[system])),
                "share": count / total,
                "importance": _held(masks[system], scores[system]),
            }
            for system in systems
        },
        "jaccard": {f"{one}-{two}": jaccard(kept[one], kept[two]) for one, two in combinations(systems, 2)},
    }
    return masks, summary


def disjoint(kept: Mapping[int, Tensors], scores: Mapping[int, Tensors]) -> dict[int, Masks]:
    """Kept sets (bool masks by System) without what goes to another System; see above."""
    totals = {system: total_importance(scores[system]) for system in kept}
    masks: dict[int, Masks] = {system: {} for system in sorted(kept)}
    for key, mask in sorted(kept[min(kept)].items()):
        owner = torch.zeros(mask.shape, dtype=torch.int8)
        largest = torch.full(owner.shape, -1.0, dtype=torch.float64)
        for system in masks:
            share = scores[system][key].double() / totals[system]
            wins = kept[system][key] & (share > largest)
            owner[wins], largest[wins] = system, share[wins]
        for system in masks:
            masks[system][key] = owner == system
    return masks


def random_each(like: Tensors, counts: Sequence[int], seed: int) -> list[Masks]:
    """Random sets of these sizes, each drawn from all elements."""
    return [random_mask(like, count, seed + number) for number, count in enumerate(counts)]


def total_importance(scores: Tensors) -> float:
    """ΣI, the nearest float64."""
    return float(count_scores(scores, whole_adapter, None)[WHOLE_ADAPTER].importance)


def count_of(masks: Tensors) -> int:
    """The number of elements in a set."""
    return sum(int(mask.sum()) for mask in masks.values())


def save_systems(masks: Mapping[int, Tensors], path: Path) -> None:
    """Write the regions, by an atomic rename."""
    keys = sorted(next(iter(masks.values())))
    packed = {key: _bits({system: mask[key] for system, mask in masks.items()}) for key in keys}
    with atomic_path(path) as draft:
        save_file(packed, draft)


def mask_of_systems(path: Path, systems: Sequence[int]) -> Masks:
    """Bool masks of the elements that any of `systems` trains.

    Raises:
        UserError: the file is missing, unreadable, or does not contain regions.
    """
    found = read_tensors(path, RECUT)
    if any(each.dtype != torch.int16 for each in found.values()):
        raise UserError(f"'{path}' does not hold regions; {RECUT}")
    bits = sum(1 << (system - 1) for system in systems)
    return {key: (found[key] & bits) != 0 for key in sorted(found)}


def _bits(masks: Mapping[int, Tensor]) -> Tensor:
    bits = torch.zeros(next(iter(masks.values())).shape, dtype=torch.int16)
    for system, mask in masks.items():
        bits |= mask.to(torch.int16) << (system - 1)
    return bits


def _held(masks: Tensors, scores: Tensors) -> float:
    inside = {key: torch.where(masks[key], scores[key], 0.0) for key in sorted(scores)}
    return total_importance(inside) / total_importance(scores)
