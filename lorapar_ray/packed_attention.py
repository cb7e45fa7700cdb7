"""Attention of a model over sequences that are concatenated in one row, by their layout (`packed_layout`).

The linear layers get a row without padding. Only for attention, queries, keys and values are gathered into batches of
sequences of similar length, for torch's fused kernels: no mask over the whole row, no computation between sequences.

The layout travels with the model's arguments (`packed_layout`), so layers that gradient checkpointing computes again
have it too. If several ranks share the row (`sequence_parallel`), the model computes a slice of its columns, and only
attention, for some of the heads, the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lorapar_ray.cpu import short_attention
from lorapar_ray.packed_layout import Layout, SpanBatch, make_layout, packed_inputs, spans_of_examples
from lorapar_ray.transfer import on_device

NAME = "lorapar_packed"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Attention options of models that the fused kernels do not support."""
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
PROBE = (7, 4)
"""Lengths of the two sequences that test a model."""
CLOSE = {torch.float32: 1e-4}
CLOSE_16_BIT = 0.05
"""Relative difference of logits due to rounding, by dtype and for 16-bit ones."""


class UnsupportedAttention(RuntimeError):
    """The model's attention is not what the packed layout computes."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_layout: Layout | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention function: [1, heads, W, D] in, [1, W, heads, D] out.

    If ranks share the row, W is this rank's part of it.

    Raises:
        UnsupportedAttention: no layout came through the model, or the model asks for more than attention.
    """
    asked = [name for name in UNSUPPORTED if options.get(name) is not None]
    if packed_layout is None or asked or (sliding_window is None and _slides(module)):
        raise UnsupportedAttention(f"no layout or no window came through the model, or it asks for {asked}")
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    sequence = packed_layout.sequence
    if sequence is not None:
        q, k, v = sequence.to_heads(q, k, v)
    batches = packed_layout.batches
    queries = _Queries.apply(q, packed_layout).split([batch.spans * batch.queries for batch in batches])
    sizes = [batch.spans * batch.keys for batch in batches]
    keys, values = (_Keys.apply(each, packed_layout).split(sizes) for each in (k, v))
    outputs = [
        _attend(*parts, sliding_window, scaling, dropout) for parts in zip(queries, keys, values, batches, strict=True)
    ]
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    answers = _Answers.apply(flat, packed_layout)
    return (answers if sequence is None else sequence.to_tokens(answers))[None], None


def _slides(module: Any) -> bool:
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    return kinds is not None and kinds[module.layer_idx] == "sliding_attention"


class _Queries(torch.autograd.Function):
    """Columns [W, …] as queries [M, …]; of a column's several outputs one is read, so one has a gradient."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return columns.contiguous() if layout.queries_M is None else columns.index_select(0, layout.queries_M)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        source = ctx.layout.source_W
        return gradient if source is None else gradient.index_select(0, source), None


class _Keys(torch.autograd.Function):
    """Columns [W, …] as keys or values [M, …]. Padding is never attended to, so it gets no gradient."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.shape = layout, columns.shape
        return columns.contiguous() if layout.keys_M is None else columns.index_select(0, layout.keys_M)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        if layout.shared:
            return gradient.new_zeros(ctx.shape).index_add_(0, layout.keys_M, gradient), None
        # without shared columns every span is causal, and its keys lie where its queries do
        return gradient if layout.keys_M is None else gradient.index_select(0, layout.source_W), None


class _Answers(torch.autograd.Function):
    """Outputs [M, …] of the queries as columns [W, …]."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.shape = layout, outputs.shape
        return outputs if layout.source_W is None else outputs.index_select(0, layout.source_W)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        source = ctx.layout.source_W
        if source is None:
            return gradient, None
        return gradient.new_zeros(ctx.shape).index_copy_(0, source, gradient), None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: SpanBatch,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Outputs [n · Q, heads, D] of one batch; q is [n · Q, heads, D], k and v are [n · K, heads, D]."""
    queries, keys, values = (each.view(batch.spans, -1, *each.shape[1:]).transpose(1, 2) for each in (q, k, v))
    if dropout == 0 and short_attention.fits(queries, keys):
        found = short_attention.attend(queries, keys, values, _mask(batch, window, q.dtype, q.device), scaling)
        return found.transpose(1, 2).flatten(0, 1)
    unmasked = batch.causal and (window is None or batch.keys <= window)
    mask = None if unmasked else _mask(batch, window, q.dtype, q.device)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not (unmasked and q.dtype.itemsize == 2):  # of a GPU's fused kernels only flash takes groups
        keys, values = (each.repeat_interleave(groups, 1) for each in (keys, values))
    found = scaled_dot_product_attention(
        queries, keys, values, mask, dropout, unmasked, scale=scaling, enable_gqa=keys.shape[1] != q.shape[1]
    )
    return found.transpose(1, 2).flatten(0, 1)


def _mask(batch: SpanBatch, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n or 1, 1, Q, K], additive: a query sees itself and, of its sequence, the `window` - 1 keys before it, or all
    (None)."""
    if (window, dtype) not in batch.masks:
        start_n, position_nK, owner_nK = (on_device(each, device) for each in batch.places())
        index_nQ = start_n[:, None] + torch.arange(batch.queries, device=device)
        index_nQ.clamp_(max=batch.keys - 1)  # of padding, whose output nobody reads
        at_nQ1, own_nQ1 = (each.gather(1, index_nQ)[:, :, None] for each in (position_nK, owner_nK))
        key_n1K, owner_n1K = position_nK[:, None], owner_nK[:, None]
        hidden = (key_n1K > at_nQ1) | ((owner_n1K != 0) & (owner_n1K != own_nQ1))
        if window is not None:
            hidden |= key_n1K <= at_nQ1 - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        batch.masks[window, dtype] = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
    return batch.masks[window, dtype]


def packs(model: Any) -> bool:
    """Whether `model` gives the same logits for packed sequences as for each alone, tested on two short ones.

    Every layer must ask for the packed attention once, and the logits must be those of the sequences apart. They are
    not if tokens interact outside attention (state spaces, convolutions, linear attention, custom code), or in an
    unknown kind of attention; then sequences are padded.
    """
    from transformers import AttentionInterface

    device = model.get_input_embeddings().weight.device
    size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(size, (length,), generator=generator) for length in PROBE]
    rows = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in sequences], batch_first=True)
    positions = torch.cat([torch.arange(length) for length in PROBE])[None]
    layout = make_layout(spans_of_examples(PROBE), sum(PROBE), device)
    packed = packed_inputs(torch.cat(sequences)[None].to(device), layout, positions.to(device))
    training = [module for module in model.modules() if module.training]
    model.eval()
    calls = 0

    def counted(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
        nonlocal calls
        calls += 1
        return packed_attention(*arguments, **options)

    try:
        with torch.no_grad():
            padded = {"input_ids": rows.to(device), "attention_mask": mask.to(device)}
            apart = model(**padded, use_cache=False).logits.float()
            with packed_attention_of(model):
                AttentionInterface.register(NAME, counted)
                together = model(**packed, use_cache=False).logits.float()
    except (UnsupportedAttention, ValueError, NotImplementedError, TypeError):
        return False
    finally:
        AttentionInterface.register(NAME, packed_attention)
        for module in training:
            module.training = True
    if calls != model.config.get_text_config().num_hidden_layers:
        return False
    apart = torch.cat([apart[index, :length] for index, length in enumerate(PROBE)])
    distance = (together[0] - apart).norm() / apart.norm()
    return bool(distance <= CLOSE.get(next(model.parameters()).dtype, CLOSE_16_BIT))


@contextmanager
def packed_attention_of(model: Any) -> Iterator[None]:
    """Inside this context `model` computes attention by its argument `packed_layout`, which is required.

    Raises:
        UnsupportedAttention: its attention cannot be replaced, or is of a kind that is not known here.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def use_packed_attention(model: Any) -> bool:
    """Give `model` the packed attention for good if it `packs`; otherwise leave it as it was."""
    if not packs(model):
        return False
    for config in _configs(model):
        config._attn_implementation_internal = NAME
    return True


def _configs(model: Any) -> list[Any]:
    """The configs that the model's parts read, each once."""
    from transformers import PreTrainedModel

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = [module for module in base.modules() if isinstance(module, PreTrainedModel)]
    if not parts or not all(part._can_set_attn_implementation() for part in parts):
        raise UnsupportedAttention("the model's attention cannot be replaced")
    found = {id(part.config): part.config for part in parts}
    if any(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS for config in found.values()):
        raise UnsupportedAttention("a layer is of a kind that is not known here")
    return list(found.values())
