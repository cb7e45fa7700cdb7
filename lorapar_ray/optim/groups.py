"""Parameter groups of a masked optimiser, by adapter key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def masked_param_groups(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    *,
    lr: float,
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups for `MaskedAdamW`, sorted by key.

    Args:
        parameters: by adapter key.
        masks: by the same keys; bool, in the shapes of the parameters.
        lora_plus_ratio: learning rate of the B matrices over that of the others (LoRA+, arXiv 2402.12354).
    """
    groups = []
    for is_b, rate in ((False, lr), (True, lr * lora_plus_ratio)):
        keys = [key for key in sorted(parameters) if (".lora_B." in key) == is_b]
        if keys:
            group = {"params": [parameters[key] for key in keys], "masks": [masks[key] for key in keys]}
            groups.append({**group, "lr": rate, "weight_decay": weight_decay})
    return groups


def trainable_share(masks: Mapping[str, Tensor]) -> float:
    """Active elements over all elements."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
