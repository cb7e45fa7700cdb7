"""Put a new LoRA on a model: stock PEFT, exact target names, float32 weights, its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorapar_ray.adapters.keys import adapter_parameters
from lorapar_ray.adapters.targets import resolve_targets

PEFT_INIT = {"default": True, "gaussian": True, "pissa": "pissa", "pissa_fast": "pissa_niter_4", "olora": "olora"}


def attach_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "qkvgud",
    init: str = "default",
    seed: int = 0,
    init_std: float = 0.01,
) -> Any:
    """A PeftModel of `model` with float32 LoRA weights, for any dtype of the base. A seed draws the same ones on every
    device: random numbers are drawn on the CPU, as PEFT itself does for `default`.

    Args:
        init: `default` (B = 0), `gaussian` (A and B from N(0, init_std²), the authors' way to avoid zero scores),
            `pissa`, `pissa_fast` (randomised SVD) or `olora`; the last three leave the model with a residual base.

    Raises:
        UserError: the model has none of the targets.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=resolve_targets(model, targets),
        init_lora_weights=PEFT_INIT[init],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
        with torch.no_grad():
            for parameter in adapter_parameters(peft_model).values():
                parameter.data = parameter.data.float()
                if init == "gaussian":
                    parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(0.0, init_std))
    return peft_model


def residual_base(peft_model: Any) -> Any:
    """The inner base model, minus the part that PiSSA or OLoRA moved into the adapter."""
    return peft_model.unload()
