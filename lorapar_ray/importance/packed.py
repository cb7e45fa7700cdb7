"""Attention over examples that lie end to end in one row, each attending to itself alone.

No mask is needed: the row is cut into its examples, padded on the right, and causal attention never looks to the right.
So the fast kernels (flash attention on a GPU and on a CPU) stay in use, and only attention computes padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.importance.batching import Layout, TokenizedExample, collate, layout_of, move, pack

NAME = "lorapar_packed_examples"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
PROBE = (7, 4)
"""Lengths of the two examples by which a model is tried."""

_current: list[Layout] = []


class _CannotPack(Exception):
    """This model's attention needs more than causal attention within each example."""


def packs(model: Any) -> bool:
    """Whether `model` computes for packed examples what it computes for each alone, tried on two short ones.

    Models whose tokens meet elsewhere than in attention (state spaces, convolutions), or in a kind of attention that
    is not known here, do not: their examples are padded.
    """
    generator = random.Random(0)
    size = model.get_input_embeddings().num_embeddings
    examples = [TokenizedExample("", [generator.randrange(size) for _ in range(n)], 1) for n in PROBE]
    device = next(model.parameters()).device
    packed, padded = pack(examples), collate(examples, 0)
    layout = layout_of(packed, device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            rows = {key: move(value, device) for key, value in padded.items() if key != "labels"}
            apart = model(**rows, use_cache=False).logits.float()
            with packed_attention(model, layout):
                row = {key: move(packed[key], device) for key in ("input_ids", "position_ids")}
                together = model(**row, use_cache=False).logits.float()
    except (_CannotPack, ValueError, NotImplementedError, TypeError):
        return False
    finally:
        for module in training:
            module.training = True
    apart = torch.cat([apart[index, :n] for index, n in enumerate(PROBE)])
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05
    distance = (together[0] - apart).norm() / apart.norm()
    return bool(distance <= tolerance)


def attention_of(model: Any, layout: Layout) -> AbstractContextManager[None]:
    """While it lasts `model` attends as a batch of this layout asks, packed or padded."""
    return packed_attention(model, layout) if layout.packed else nullcontext()


@contextmanager
def packed_attention(model: Any, layout: Layout) -> Iterator[None]:
    """While it lasts `model` attends within the examples of `layout`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    configs = _configs(base)
    before = [config._attn_implementation_internal for config in configs]
    _current.append(layout)
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        _current.pop()
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def _configs(model: nn.Module) -> list[Any]:
    """The configs that the model's parts read, each once."""
    from transformers import PreTrainedModel

    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not parts or not all(part._can_set_attn_implementation() for part in parts):
        raise _CannotPack
    found = {id(part.config): part.config for part in parts}
    if any(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS for config in found.values()):
        raise _CannotPack
    return list(found.values())


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [1, heads, T, size] and so on give [1, T, heads, size]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")) or dropout:
        raise _CannotPack
    if sliding_window is None and _slides(module):
        raise _CannotPack
    layout = _current[-1]
    padded = [_Pad.apply(each[0].transpose(0, 1), layout) for each in (query, key, value)]
    rows = [each.view(len(layout.lengths), layout.longest, *each.shape[1:]).transpose(1, 2) for each in padded]
    mask = None
    if sliding_window is not None and layout.longest > sliding_window:
        ages = torch.arange(layout.longest, device=query.device)
        ages = ages[:, None] - ages[None, :]
        mask = ((ages >= 0) & (ages < sliding_window))[None, None]
    result, _ = sdpa_attention_forward(module, *rows, mask, scaling=scaling, is_causal=True)
    return _Unpad.apply(result.flatten(0, 1), layout)[None], None


def _slides(module: Any) -> bool:
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    return kinds is not None and kinds[module.layer_idx] == "sliding_attention"


class _Pad(torch.autograd.Function):
    """Tokens [T, …] as padded rows [examples · longest, …]. Padding repeats token 0 and gets no gradient back."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return tokens.contiguous() if layout.slots is None else tokens.index_select(0, layout.slots)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        home = ctx.layout.home
        return gradient if home is None else gradient.index_select(0, home), None


class _Unpad(torch.autograd.Function):
    """The inverse of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.shape = layout, rows.shape
        return rows if layout.home is None else rows.index_select(0, layout.home)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        home = ctx.layout.home
        if home is None:
            return gradient, None
        return gradient.new_zeros(ctx.shape).index_copy_(0, home, gradient), None
