"""torch's own AdamW, as one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def torch_adamw(
    values: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    number: int,
    group: dict[str, Any],
    *,
    fused: bool,
) -> None:
    """Take step `number` (from 1) in place, with the settings of a parameter group."""
    before = torch.full((), number - 1.0, device=values[0].device if fused else "cpu")
    adamw(
        values,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        [before.clone() for _ in values],
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
