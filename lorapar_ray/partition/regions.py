"""Regions of the adapter: the elements that each System needs, and those that each stage trains (paper, section 3.3).

One uint8 per element: bit 0 kept for System 1 (K1), bit 1 kept for System 2 (K2), bit 2 trained in stage 1, bit 3
trained in stage 2. Stage 1 trains K1∖K2 and a fraction α of K1∩K2; stage 2 trains K2∖K1 and a fraction β of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from hashlib import sha256
from math import floor
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorapar_ray.boundary import damaged, read_tensors_and_metadata
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path
from lorapar_ray.partition.blocks import same_layout
from lorapar_ray.partition.select import keep_count, random_scores

RECUT = "run `lorapar partition` to write it again"
KEPT_1, KEPT_2, STAGE_1, STAGE_2 = 1, 2, 4, 8
SHARED = KEPT_1 | KEPT_2


def assign_regions(
    k1: Mapping[str, Tensor],
    k2: Mapping[str, Tensor],
    scores1: Mapping[str, Tensor],
    scores2: Mapping[str, Tensor],
    *,
    alpha: float,
    beta: float,
    activation: Literal["importance", "random"] = "importance",
    seed: int = 0,
) -> dict[str, Tensor]:
    """uint8 regions, same keys and shapes as the bool masks `k1`, `k2` and the float32 scores of both Systems.

    Of the n shared elements stage 1 trains α·n, rounded half up, the most important for System 1 first (`scores1`,
    ties by position); stage 2 likewise β·n by `scores2`. With `activation` "random" each stage draws its part from
    `seed` instead. α = β = 1 trains every shared element in both stages.

    Raises:
        UserError: α or β outside [0, 1], or the masks and scores are not of one adapter.
    """
    for name, fraction in (("alpha", alpha), ("beta", beta)):
        if not 0 <= fraction <= 1:
            raise UserError(f"partition.{name} must be in [0, 1], got {fraction}")
    same_layout(k1, k2, "masks of the two Systems")
    same_layout(k1, scores1, "masks and scores of System 1")
    same_layout(k2, scores2, "masks and scores of System 2")
    shared = {key: k1[key] & k2[key] for key in sorted(k1)}
    count = sum(int(mask.sum()) for mask in shared.values())
    active = []
    for fraction, scores, stage in ((alpha, scores1, 1), (beta, scores2, 2)):
        ranking = random_scores(shared, seed * 2 + stage) if activation == "random" else scores
        active.append(_keep_within(shared, ranking, round_half_up(fraction, count)))
    return {
        key: _bit(k1[key], KEPT_1)
        | _bit(k2[key], KEPT_2)
        | _bit((k1[key] & ~k2[key]) | active[0][key], STAGE_1)
        | _bit((k2[key] & ~k1[key]) | active[1][key], STAGE_2)
        for key in sorted(k1)
    }


def stage_mask(regions: Mapping[str, Tensor], stage: Literal[1, 2]) -> dict[str, Tensor]:
    """Bool masks, same keys and shapes as `regions`, of what `stage` trains; everything else stays frozen."""
    bit = {1: STAGE_1, 2: STAGE_2}[stage]
    return {key: (regions[key] & bit) != 0 for key in sorted(regions)}


def mask_digest(regions: Mapping[str, Tensor], bit: int) -> str:
    """sha256, in hex, of the elements with a bit."""
    found = sha256()
    for key in sorted(regions):
        found.update(key.encode())
        found.update((regions[key] & bit).numpy().tobytes())
    return found.hexdigest()


def save_regions(regions: Mapping[str, Tensor], path: Path, *, theta: float, alpha: float, beta: float) -> None:
    """Write `regions` as safetensors by an atomic rename, with θ, α and β as JSON in the metadata field "cut".

    One field, because safetensors writes several fields in random order, and equal regions should give equal bytes.
    """
    metadata = {"cut": json.dumps({"theta": theta, "alpha": alpha, "beta": beta})}
    with atomic_path(path) as draft:
        save_file({key: regions[key].contiguous() for key in sorted(regions)}, draft, metadata=metadata)


def load_regions(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The regions `save_regions` wrote, and θ, α, β under "theta", "alpha", "beta".

    Raises:
        UserError: the file is missing, unreadable, or does not contain regions.
    """
    found, metadata = read_tensors_and_metadata(path, RECUT)
    regions = {key: found[key] for key in sorted(found)}
    if any(region.dtype != torch.uint8 for region in regions.values()) or "cut" not in metadata:
        raise UserError(f"'{path}' does not hold regions; {RECUT}")
    with damaged(path, RECUT):
        cut = json.loads(metadata["cut"])
        return regions, {name: float(cut[name]) for name in ("theta", "alpha", "beta")}


def round_half_up(fraction: float, count: int) -> int:
    """fraction · count to the nearest integer, halves upwards; the fraction is read as its printed decimal."""
    return floor(Fraction(str(float(fraction))) * count + Fraction(1, 2))


def _bit(mask: Tensor, bit: int) -> Tensor:
    return mask.to(torch.uint8) * bit


def _keep_within(inside: Mapping[str, Tensor], ranking: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Bool masks of the `count` highest-ranked elements among those `inside`; ties by position."""
    kept = keep_count({key: ranking[key][mask] for key, mask in inside.items()}, count)
    masks = {key: torch.zeros_like(mask) for key, mask in inside.items()}
    for key, mask in inside.items():
        masks[key][mask] = kept[key]
    return masks
