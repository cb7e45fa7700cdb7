"""Attention over sequences that lie end to end in one row, each of which sees its prompt and itself.

The linear layers see a row without padding, in which a prompt stands once for all of its completions. Only for the
attention itself are queries, keys and values gathered into batches of sequences of like length, for torch's fused
kernels: no mask over the whole row, no work between sequences. A completion of length L behind a shared prompt of
length P is laid out in one of two ways, whichever costs less:

- `whole`: prompt and completion as one causal sequence, (P + L)² / 2 pairs, no mask;
- `behind`: the completion's queries alone against both, L · (P + L) pairs, with a mask that the kernel does not skip.

The least there is are L · P + L² / 2 pairs. The better of the two is within 4/3 of it (at L = P). That is all that
block masks (FlexAttention) could save, and they need a compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "lorapar_packed"
MASKED_COST = 2.0
"""What a pair costs in a kernel with a mask beside one in the causal kernel."""
BATCH_COST = {"cpu": 2_000, "cuda": 200_000}
"""What another batch of sequences costs, in pairs: gathers and launches."""
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What a model may ask of its attention that the fused kernels do not do."""


class UnsupportedAttention(RuntimeError):
    """The model's attention is not what the packed layout computes."""


@dataclass(frozen=True)
class Span:
    """One sequence as attention sees it: its queries are the last ones of its keys."""

    keys: list[int]
    """Columns of the row, from the prompt's first token on."""
    queries: int
    """How many of them, from the end, ask."""
    answers: int
    """How many of those, from the end, are read: a prompt is read from one of its completions only."""


@dataclass
class SpanBatch:
    """Spans of like length, padded on the right: n spans, Q queries, K keys."""

    queries_nQ: Tensor
    keys_nK: Tensor
    start_n: Tensor
    """Position of the first query among the keys."""
    causal: bool
    """Queries are the keys."""
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """By window and dtype, made once for all layers."""


@dataclass(frozen=True)
class Layout:
    """How the sequences of one packed row of width W attend."""

    batches: list[SpanBatch]
    source_W: Tensor
    """Where each column's output lies in those of all batches, one after the other."""


def make_layout(spans: Sequence[Span], width: int, device: torch.device) -> Layout:
    """Spans into batches; each of the row's `width` columns must be an answer of exactly one span."""
    source = torch.full((width,), -1)
    batches, offset = [], 0
    for causal in (True, False):
        chosen = [span for span in spans if (span.queries == len(span.keys)) == causal]
        for part in by_length(chosen, causal, BATCH_COST.get(device.type, BATCH_COST["cuda"])):
            Q, K = max(span.queries for span in part), max(len(span.keys) for span in part)
            queries, keys = torch.zeros((len(part), Q), dtype=torch.long), torch.zeros((len(part), K), dtype=torch.long)
            for index, span in enumerate(part):
                columns = torch.tensor(span.keys)
                keys[index, : len(columns)] = columns
                queries[index, : span.queries] = columns[len(columns) - span.queries :]
                last = offset + index * Q + span.queries
                source[columns[len(columns) - span.answers :]] = torch.arange(last - span.answers, last)
            starts = torch.tensor([len(span.keys) - span.queries for span in part])
            batches.append(SpanBatch(queries.to(device), keys.to(device), starts.to(device), causal))
            offset += len(part) * Q
    if int(source.min()) < 0:
        raise ValueError("a column of the packed row belongs to no sequence")
    return Layout(batches, source.to(device))


def by_length(spans: Sequence[Span], causal: bool, batch_cost: float) -> list[list[Span]]:
    """Spans from long to short in batches, a new one where padding would cost more than another batch."""
    parts: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (-len(span.keys), -span.queries)):
        if parts:
            first = parts[-1][0]
            padded = max(first.queries, span.queries) * len(first.keys)
            if padded - span.queries * len(span.keys) <= batch_cost:
                parts[-1].append(span)
                continue
        parts.append([span])
    return parts


def spans_of_group(prompt: range, completions: Sequence[range]) -> list[Span]:
    """How a prompt and the completions that share it attend, by cost; both are columns of the row."""
    own = [list(columns) for columns in completions if columns]
    start = len(prompt)
    if not own:
        return [Span(list(prompt), start, start)]
    whole = sum((start + len(columns)) ** 2 / 2 for columns in own)
    behind = start**2 / 2 + MASKED_COST * sum(len(columns) * (start + len(columns)) for columns in own)
    keys = [[*prompt, *columns] for columns in own]
    if whole <= behind:
        reads = [len(keys[0]), *(len(columns) for columns in own[1:])]
        return [Span(each, len(each), read) for each, read in zip(keys, reads, strict=True)]
    return [
        Span(list(prompt), start, start),
        *(Span(each, len(columns), len(columns)) for each, columns in zip(keys, own, strict=True)),
    ]


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

    Raises:
        UnsupportedAttention: no layout came through the model, or the model asks for more than attention.
    """
    asked = [name for name in UNSUPPORTED if options.get(name) is not None]
    if packed_layout is None or asked:
        raise UnsupportedAttention(f"no layout came through the model, or it asks for {asked}")
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    outputs = [_attend(q, k, v, batch, sliding_window, scaling, dropout) for batch in packed_layout.batches]
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat.index_select(0, packed_layout.source_W)[None], None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, batch: SpanBatch, window: int | None, scaling: float | None, dropout: float
) -> Tensor:
    """Outputs [n · Q, heads, D] of one batch; q, k and v are [W, heads, D]."""
    queries, keys, values = (
        each.index_select(0, columns.flatten()).view(*columns.shape, *each.shape[1:]).transpose(1, 2)
        for each, columns in ((q, batch.queries_nQ), (k, batch.keys_nK), (v, batch.keys_nK))
    )
    unmasked = batch.causal and (window is None or batch.keys_nK.shape[1] <= window)
    mask = None if unmasked else _mask(batch, window, q.dtype)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not (unmasked and q.dtype.itemsize == 2):  # of a GPU's fused kernels only flash takes groups
        keys, values = (each.repeat_interleave(groups, 1) for each in (keys, values))
    found = scaled_dot_product_attention(
        queries, keys, values, mask, dropout, unmasked, scale=scaling, enable_gqa=keys.shape[1] != q.shape[1]
    )
    return found.transpose(1, 2).flatten(0, 1)


def _mask(batch: SpanBatch, window: int | None, dtype: torch.dtype) -> Tensor:
    """[n or 1, 1, Q, K], additive: a query sees itself and the `window` - 1 keys before it, or all (None)."""
    if (window, dtype) not in batch.masks:
        device = batch.keys_nK.device
        start_n = batch.start_n[:1] if batch.causal else batch.start_n
        asks = start_n[:, None, None] + torch.arange(batch.queries_nQ.shape[1], device=device)[:, None]
        sees = torch.arange(batch.keys_nK.shape[1], device=device)
        hidden = sees > asks
        if window is not None:
            hidden |= sees <= asks - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        batch.masks[window, dtype] = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
    return batch.masks[window, dtype]


def use_packed_attention(model: Any) -> bool:
    """Give `model` the packed attention if that is what its layers compute; otherwise leave it as it was.

    Tried on four tokens: each layer must ask for it, once, with nothing the fused kernels lack. A layer that does not
    (state spaces, linear attention, code of its own) would let one sequence see the next.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    before = model.config._attn_implementation
    calls = 0

    def counted(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
        nonlocal calls
        calls += 1
        return packed_attention(*arguments, **options)

    device = model.get_input_embeddings().weight.device
    layout = make_layout([Span([0, 1], 2, 2), Span([2, 3], 2, 2)], 4, device)
    AttentionInterface.register(NAME, counted)
    try:
        model.set_attn_implementation(NAME)
        with torch.no_grad():
            model(**packed_inputs(torch.tensor([[3, 4, 5, 6]], device=device) % 7, layout), use_cache=False)
        if calls == model.config.get_text_config().num_hidden_layers:
            return True
    except (UnsupportedAttention, TypeError, ValueError):
        pass
    finally:
        AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(before)
    return False


def packed_inputs(input_ids_1W: Tensor, layout: Layout, position_ids_1W: Tensor | None = None) -> dict[str, Any]:
    """The model's inputs for one packed row."""
    if position_ids_1W is None:
        position_ids_1W = torch.zeros_like(input_ids_1W)
    return {"input_ids": input_ids_1W, "position_ids": position_ids_1W, "packed_layout": layout}
