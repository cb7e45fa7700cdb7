"""An adapter's parameters under PEFT's saved names, which every file of a run uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ADAPTER = "default"


def adapter_parameters(peft_model: Any) -> dict[str, nn.Parameter]:
    """The live LoRA A and B parameters by saved key, sorted by key."""
    marked = {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in peft_model.named_parameters()
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
    }
    return dict(sorted(marked.items()))


def adapter_state(peft_model: Any) -> dict[str, Tensor]:
    """Float32 copies of `adapter_parameters` on the CPU."""
    return {key: p.detach().float().cpu().clone() for key, p in adapter_parameters(peft_model).items()}
