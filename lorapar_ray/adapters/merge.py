"""base + s·BA, computed in float32 from the base's own weights and rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.mergeable import base_name


def lora_scaling(settings: Mapping[str, Any]) -> float:
    """s = alpha / r, or alpha / √r for rank-stabilised LoRA; `settings` as in `adapter_config.json`."""
    rank, alpha = float(settings["r"]), float(settings["lora_alpha"])
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank


@torch.no_grad()
def merged_weights(
    base_weights: Mapping[str, Tensor], adapter_state: Mapping[str, Tensor], *, scaling: float, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, W + s·BA) for every adapted weight.

    Args:
        base_weights: base tensors [out, in] by checkpoint name; only the adapted ones are read.
        adapter_state: A [r, in] and B [out, r] by adapter key, on the base's device.
        dtype: of the result: the dtype of the computation. The dtype of a bfloat16 base file would add its rounding
            (0.02 nats and more) even if the model runs in float32.
    """
    wide: dict[torch.Size, Tensor] = {}  # allocating memory for each product would take longer than the product
    for key in sorted(adapter_state):
        if ".lora_A." not in key:
            continue
        base = base_weights[base_name(key)]
        down, up = adapter_state[key].float(), adapter_state[key.replace(".lora_A.", ".lora_B.")].float()
        if base.shape not in wide:
            wide[base.shape] = torch.empty_like(base, dtype=torch.float32)
        merged = wide[base.shape].copy_(base).addmm_(up, down, alpha=scaling)
        yield base_name(key), merged.to(dtype, copy=True)
