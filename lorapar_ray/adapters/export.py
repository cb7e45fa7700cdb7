"""PiSSA and OLoRA adapters as plain LoRA on the original base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.adapters.store import read_adapter_state, write_adapter_state
from lorapar_ray.boundary import read_object


def export_plain(initial: Path, trained: Path, out: Path, original: str) -> None:
    """Write a PiSSA or OLoRA adapter as a plain LoRA of twice the rank on the original base.

    Args:
        initial: the adapter before training, on the residual base.
        trained: the adapter after training.
        original: the base that the plain adapter's config names.
    """
    settings = read_object(trained / "adapter_config.json")
    state, plain = to_plain_lora(read_adapter_state(initial), read_adapter_state(trained), settings)
    write_adapter_state(out, {**plain, "base_model_name_or_path": original}, state)


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
