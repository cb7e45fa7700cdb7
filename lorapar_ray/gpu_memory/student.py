"""The student's size, by building it without its weights: torch's meta device keeps shapes and no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.config import AdapterConfig, ModelConfig
from lorapar_ray.grpo.logit_transform import names_a_transform
from lorapar_ray.grpo.memory import saved_bytes

PROBE_TOKENS = 128
NF4_BYTES = 0.53
"""Bytes of a 4-bit weight: its code, and its share of the quantised constants (arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class StudentSize:
    """The student's sizes, in bytes unless stated otherwise."""

    base: float
    """The frozen weights in training."""
    served: float
    """The same in an engine: 16 bits each."""
    outside: float
    """What no decoder layer holds: embeddings, output head, last norm. Part of `base`."""
    largest_layer: float
    """A decoder layer, which sharding gathers whole."""
    elements: int
    """Number of the adapter's parameters."""
    kept: float
    """Activations stored for the backward pass, per token; without dropout, as in scoring and stage 2."""
    kept_with_dropout: float
    """The same in stage 1."""
    checkpointed: float
    """The same with gradient checkpointing: every layer's input."""
    recomputed: float
    """In addition, the most that one layer stores while it is recomputed, per token."""
    cache: float
    """Keys and values of one token in 16 bits, over all layers."""
    vocabulary: int
    """Numbers of a token's logits."""
    logit: int
    """Bytes of each."""
    ends_with_head: bool
    """Whether the logits are the output of a linear head, unchanged: then scoring never stores them."""
    stores_logits: bool
    """Whether stage 2 stores them, as far as shapes and the config tell: the head is not a plain linear one, or
    something that the config does not name follows it. What that does to the logits is seen only with the weights
    (`grpo.head`), as is whether the model does what its config says."""


def student_size(model: ModelConfig, adapter: AdapterConfig) -> StudentSize:
    """The sizes of `model` with `adapter` on a GPU.

    Attention counts as in the fused kernels: queries, keys, values and output, no matrix of all pairs.

    Raises:
        UserError: the model's configuration cannot be read here.
    """
    from transformers import AutoModelForCausalLM

    from lorapar_ray.adapters import adapter_parameters, attach_lora
    from lorapar_ray.models import architecture, loading, resolve_model

    path = resolve_model(model.path)
    config = architecture(path, model.trust_remote_code)
    dtype = torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype)
    with torch.device("meta"), loading(path):
        base = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=model.trust_remote_code
        )
    text = config.get_text_config()
    numbers = {key: value.numel() for key, value in base.named_parameters()}
    layers = _layers(base)
    in_layers = sum(value.numel() for layer in layers for value in layer.parameters())
    outside = sum(numbers.values()) - in_layers
    linear = NF4_BYTES if model.quantization else dtype.itemsize
    trained = attach_lora(
        base, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, targets=adapter.targets
    )
    kept, kept_with_dropout = _kept_per_token(trained.eval()), _kept_per_token(trained.train())
    inputs = float(len(layers) * text.hidden_size * dtype.itemsize)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    ends_with_head = _ends_with_head(trained)
    return StudentSize(
        base=in_layers * linear + outside * dtype.itemsize,
        served=2.0 * (in_layers + outside),
        outside=float(outside * dtype.itemsize),
        largest_layer=in_layers / max(1, len(layers)) * linear,
        elements=sum(value.numel() for value in adapter_parameters(trained).values()),
        kept=kept,
        kept_with_dropout=kept_with_dropout,
        checkpointed=inputs,
        recomputed=kept_with_dropout / max(1, len(layers)),
        cache=2.0 * 2 * len(layers) * key_heads * head_dim,
        vocabulary=text.vocab_size,
        logit=dtype.itemsize,
        ends_with_head=ends_with_head,
        stores_logits=not (_linear_head(trained) and (ends_with_head or names_a_transform(trained))),
    )


def _layers(base: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def _kept_per_token(model: Any) -> float:
    """Bytes that autograd stores per token of a forward pass, without the weights; computes nothing."""
    with saved_bytes(model) as kept:
        logits = _probe(model)
    del logits  # the stored tensors stay alive until here, so that every storage has its own id
    return sum(kept.values()) / PROBE_TOKENS


def _linear_head(model: Any) -> bool:
    return type(model.get_output_embeddings()) is torch.nn.Linear


def _ends_with_head(model: Any) -> bool:
    if not _linear_head(model):
        return False
    head = model.get_output_embeddings()
    seen: list[Any] = []
    handle = head.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        logits = _probe(model)
    finally:
        handle.remove()
    return any(logits is each for each in seen)


def _probe(model: Any) -> Tensor:
    """Logits of `PROBE_TOKENS` tokens."""
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool, device="meta")  # else it reads the ids
    with _fused_attention():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits
    return logits


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch would select the kernel that stores a matrix of all pairs, which no GPU uses."""
    usual = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = _Fused.attend
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = usual


class _Fused(torch.autograd.Function):
    """Stores the same as FlashAttention (arXiv 2307.08691): queries, keys, values, output and a number per query."""

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        result: Tensor = _Fused.apply(query, key, value)
        return result

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        normalisers = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, normalisers)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("only memory is looked at")
