"""Scores for the tests of the partition."""

from __future__ import annotations

import torch
from torch import Tensor

Scores = dict[str, Tensor]


def flat(tensors: Scores) -> Tensor:
    return torch.cat([tensors[key].reshape(-1) for key in sorted(tensors)])


def skewed(seed: int, layers: int = 2, modules: tuple[str, ...] = ("q", "k", "v", "gate", "up", "down")) -> Scores:
    """Scores like a Taylor estimate's on a Gaussian adapter: products of Gaussians, with PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for layer in range(layers):
        for module in modules:
            block = "self_attn" if module in "qkv" else "mlp"
            for matrix, shape in (("A", (4, 30)), ("B", (30, 4))):
                key = f"base_model.model.model.layers.{layer}.{block}.{module}_proj.lora_{matrix}.weight"
                scores[key] = (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator)).abs()
    return scores
