"""PiSSA and OLoRA adapters as plain LoRA on the original base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_plain_lora(
    initial: Mapping[str, Tensor], trained: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rank 2r adapter on the original base that equals `trained` on the residual base (method, section 4).

    The residual base is W − s·B₀A₀, so `W − s·B₀A₀ + s·BₜAₜ = W + s·[Bₜ, −B₀][Aₜ; A₀]`: rank and alpha double, and
    the scaling s = alpha / r stays.

    Args:
        initial: the adapter's state before training.
        trained: its state after training.
        settings: the adapter's config; rank-stabilised LoRA (s = alpha / √r) is handled too.
    """
    state = {}
    for key, now in trained.items():
        before = initial[key].to(now.dtype)
        state[key] = torch.cat([now, before], dim=0) if ".lora_A." in key else torch.cat([now, -before], dim=1)
    growth = 2**0.5 if settings.get("use_rslora") else 2
    plain = {**settings, "r": 2 * settings["r"], "lora_alpha": growth * settings["lora_alpha"]}
    return state, {**plain, "init_lora_weights": True}
