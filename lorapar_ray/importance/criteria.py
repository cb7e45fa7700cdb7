"""The estimated change of the loss if one LoRA element were zero."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lorapar_ray.errors import UserError
from lorapar_ray.importance.sums import GradSums

Criterion = Literal["taylor2", "taylor1", "fisher", "magnitude", "random"]


def score(criterion: Criterion, phi: Mapping[str, Tensor], sums: GradSums, seed: int = 0) -> dict[str, Tensor]:
    """Importance of every element, float32 and non-negative, by adapter key.

    Args:
        criterion: `taylor2` |g φ − ½ F φ²| (arXiv 2507.20999, section 3.2), `taylor1` |g φ|, `fisher` F φ²,
            `magnitude` |φ|, or `random` (seeded per key, so that no order or worker count changes it).
        phi: the adapter's values.
        sums: gradient sums over the scored examples, with the same keys.

    Raises:
        UserError: a score is not finite, or every score is zero.
    """
    scores = {key: _one(criterion, key, value.float(), sums, seed) for key, value in sorted(phi.items())}
    for key, value in scores.items():
        if not torch.isfinite(value).all():
            raise UserError(f"importance of '{key}' is not finite; score in a wider model.dtype or check the data")
    if not any(bool(value.any()) for value in scores.values()):
        raise UserError(
            "every importance score is zero: with B = 0 neither A nor B has any; "
            "set adapter.warmup_steps above 0 or adapter.init to gaussian, pissa or olora"
        )
    return scores


def _one(criterion: Criterion, key: str, phi: Tensor, sums: GradSums, seed: int) -> Tensor:
    if criterion == "magnitude":
        return phi.abs()
    if criterion == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode()))
        return torch.rand(phi.shape, generator=generator)
    gradient, fisher = (value.to(phi.device) for value in sums.mean(key))
    if criterion == "taylor1":
        return (gradient * phi).abs()
    if criterion == "fisher":
        return fisher * phi * phi
    return (gradient * phi - 0.5 * fisher * phi * phi).abs()
