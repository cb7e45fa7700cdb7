"""θ curves: how much of the adapter each threshold keeps, and the overlap of the two Systems' kept sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lorapar_ray.adapters.targets import module_type
from lorapar_ray.partition.blocks import same_layout
from lorapar_ray.partition.histogram import Threshold
from lorapar_ray.partition.passes import WHOLE_ADAPTER
from lorapar_ray.partition.select import find_thresholds, mask_blocks

THETAS = tuple(tenths / 10 for tenths in range(1, 11))

QKV = ("q", "k", "v", "qkv")
GUD = ("gate", "up", "gate_up", "down")
SUBSETS = {"qkvgud": QKV + GUD, "qkv": QKV, "gud": GUD}
"""The sets of modules that the paper's θ table compares; a fused projection stands for its parts."""


def theta_curves(
    scores1: Mapping[str, Tensor], scores2: Mapping[str, Tensor], thetas: Sequence[float] = THETAS
) -> dict[str, Any]:
    """θ curves of both Systems' scores (float32), each subset of modules ranked separately, as in the paper's θ table.

    Returns:
        "theta", and for each subset with modules in the adapter: "modules" (their names), "system1" and "system2"
        (share of elements kept, in [0, 1]) and "jaccard" (index of the two kept sets), one number per θ.

    Raises:
        UserError: as `select.keep_top`, or the scores are not of one adapter.
    """
    same_layout(scores1, scores2, "scores of the two Systems")
    curves: dict[str, Any] = {"theta": list(thetas)}
    for name, modules in SUBSETS.items():
        keys = [key for key in scores1 if module_type(key) in modules]
        if keys:
            subset1, subset2 = ({key: scores[key] for key in keys} for scores in (scores1, scores2))
            present = {module_type(key) for key in keys}
            curves[name] = {"modules": [m for m in modules if m in present], **_curve(subset1, subset2, thetas)}
    return curves


def _curve(
    scores1: Mapping[str, Tensor], scores2: Mapping[str, Tensor], thetas: Sequence[float]
) -> dict[str, list[float]]:
    cuts1, cuts2 = find_thresholds(scores1, thetas), find_thresholds(scores2, thetas)
    return {
        "system1": [cut[WHOLE_ADAPTER].share for cut in cuts1],
        "system2": [cut[WHOLE_ADAPTER].share for cut in cuts2],
        "jaccard": [_jaccard(scores1, scores2, one, two) for one, two in zip(cuts1, cuts2, strict=True)],
    }


def _jaccard(
    scores1: Mapping[str, Tensor],
    scores2: Mapping[str, Tensor],
    cuts1: Mapping[str, Threshold],
    cuts2: Mapping[str, Threshold],
) -> float:
    # block by block, to avoid masks as large as the adapter
    both = either = 0
    masks1, masks2 = mask_blocks(scores1, cuts1), mask_blocks(scores2, cuts2)
    for (_, mask1), (_, mask2) in zip(masks1, masks2, strict=True):
        both += int((mask1 & mask2).sum())
        either += int((mask1 | mask2).sum())
    return both / either
