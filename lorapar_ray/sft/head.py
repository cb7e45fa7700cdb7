"""A CPU's output head for TRL's trainer.

TRL scores only the tokens with a loss where Triton runs. On a CPU it scores every position, and again in the backward
pass: with short answers to long questions that is more work than the rest of a small model.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from trl.trainer.utils import FusedCausalLMOutput

from lorapar_ray.datasets.chat import NO_LOSS
from lorapar_ray.logprobs import head_sees, token_logprobs


def score_labels_only(base: Any) -> None:
    """Let `base(..., fused_lm_head=True)`, as TRL's trainer calls it, compute logits for the labels alone."""
    usual = base.forward

    def forward(self: Any, *arguments: Any, fused_lm_head: bool = False, **options: Any) -> Any:
        if not fused_lm_head or options.get("labels") is None:
            return usual(*arguments, fused_lm_head=fused_lm_head, **options)
        labels: Tensor = options.pop("labels")
        mask = labels[:, 1:] != NO_LOSS
        with head_sees(functional.pad(mask, (0, 1)), self, labels.shape) as selected:
            output = usual(*arguments, **options)
        logits = output.logits.squeeze(0) if selected() else output.logits[:, :-1][mask]
        targets = labels[:, 1:][mask]
        logprobs, entropy = token_logprobs(logits, targets)
        zeros = torch.zeros(mask.shape, device=mask.device)
        return FusedCausalLMOutput(
            log_probs=zeros.masked_scatter(mask, logprobs),
            entropy=zeros.masked_scatter(mask, entropy),
            is_top1=mask.masked_scatter(mask, logits.argmax(-1) == targets),
            label_mask=mask,
            aux_loss=getattr(output, "aux_loss", None),
        )

    base.forward = types.MethodType(forward, base)
