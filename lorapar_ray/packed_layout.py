"""How sequences that are concatenated in one row attend: to themselves, and to a prompt that they share.

Queries, keys and values are gathered into batches of sequences of similar length (`Layout`). Scoring packs whole
examples. Stage 2's learner packs groups, with one prompt for all of its completions. The G completions of length L
after a shared prompt of length P are laid out in the cheapest of three ways:

- `whole`: prompt and completion as one causal sequence each, G · (P + L)² / 2 pairs, no mask;
- `behind`: only a completion's queries against both, G · L · (P + L) pairs, with a mask that the kernel does not skip;
- `together`: the queries of all completions against one copy of the prompt and all completions, G · L · (P + G · L)
  pairs with a mask, but G times fewer keys to gather, and to sum gradients of: for short completions.

The minimum is G · (L · P + L² / 2) pairs. The better of the first two is within 4/3 of it (at L = P). Block masks
(FlexAttention) could save only this, and they need a compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.sequence_parallel import SequenceGroup
from lorapar_ray.transfer import on_device

MASKED_COST = 2.0
"""Cost of a pair in a kernel with a mask, relative to the causal kernel."""
KEY_COST = 100.0
"""Cost of gathering a key and its value, and of summing their gradients, in pairs. Fitted on a CPU with two cores; for
a GPU's bandwidth and arithmetic the ratio is similar by calculation."""
BATCH_COST = {"cpu": 2_000, "cuda": 200_000}
"""Cost of an additional batch of sequences, in pairs: gathers and launches."""


@dataclass(frozen=True)
class Span:
    """One sequence as attention sees it: its queries are the last ones of its keys."""

    keys: Sequence[int]
    """Columns of the row, from the prompt's first token on."""
    queries: int
    """Number of queries, from the end."""
    answers: int
    """Number of those, from the end, whose output is used: a prompt's output comes from only one of its completions."""
    completions: Sequence[int] = ()
    """Lengths of the completions that the queries are, if they are several. Each sees the prompt and itself."""

    @property
    def positions(self) -> Tensor:
        """Of the keys in their sequences: completions begin where the prompt ends."""
        start = len(self.keys) - self.queries
        own = [torch.arange(start, start + length) for length in self.completions or (self.queries,)]
        return torch.cat([torch.arange(start), *own])

    @property
    def owners(self) -> Tensor:
        """The completion, from 1, that alone sees a key; 0: all see it."""
        lengths = torch.tensor(self.completions, dtype=torch.int64)
        numbers = torch.arange(1, len(lengths) + 1).repeat_interleave(lengths)
        return nn.functional.pad(numbers, (len(self.keys) - len(numbers), 0))


@dataclass
class SpanBatch:
    """Spans of like length, padded on the right: n spans, Q queries, K keys."""

    parts: Sequence[Span]
    queries: int
    keys: int
    causal: bool
    """Queries are the keys."""
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """By window and dtype, made once for all layers that need one."""

    @property
    def spans(self) -> int:
        """Number of them."""
        return len(self.parts)

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """The index of the first query among the keys [n], `Span.positions` [n, K], and `Span.owners` [n, K], with −1
        in padding; causal: n = 1, for all spans."""
        if self.causal:  # padding comes after all queries
            positions = torch.arange(self.keys)[None]
            return torch.zeros(1, dtype=torch.int64), positions, torch.zeros_like(positions)
        starts = torch.tensor([len(span.keys) - span.queries for span in self.parts])
        positions = nn.utils.rnn.pad_sequence([span.positions for span in self.parts], True)
        return starts, positions, nn.utils.rnn.pad_sequence([span.owners for span in self.parts], True, -1)


@dataclass(frozen=True)
class Layout:
    """Attention layout of one packed row of width W; batches are concatenated."""

    batches: list[SpanBatch]
    queries_M: Tensor | None
    """Column of each query, span by span, 0 in padding; None: the row itself."""
    keys_M: Tensor | None
    """The same of the keys and values."""
    source_W: Tensor | None
    """Position of each column's output among the queries; None: the row itself."""
    shared: bool
    """Some column is a key of several spans."""
    sequence: SequenceGroup | None = None
    """The ranks that share the row; None: this one has the whole row."""


def make_layout(
    spans: Sequence[Span], width: int, device: torch.device, sequence: SequenceGroup | None = None
) -> Layout:
    """Spans into batches; each of the row's `width` columns must be an answer of exactly one span."""
    source = torch.full((width,), -1)
    batches: list[SpanBatch] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    offset = 0
    for causal in (True, False):
        chosen = [span for span in spans if (span.queries == len(span.keys)) == causal]
        for part in by_length(chosen, BATCH_COST.get(device.type, BATCH_COST["cuda"])):
            Q, K = max(span.queries for span in part), max(len(span.keys) for span in part)
            for span in part:
                columns = torch.as_tensor(span.keys)
                keys.append(nn.functional.pad(columns, (0, K - len(columns))))
                queries.append(nn.functional.pad(columns[len(columns) - span.queries :], (0, Q - span.queries)))
                last = offset + span.queries
                source[columns[len(columns) - span.answers :]] = torch.arange(last - span.answers, last)
                offset += Q
            batches.append(SpanBatch(part, Q, K, causal))
    if int(source.min()) < 0:
        raise ValueError("a column of the packed row belongs to no sequence")
    as_it_is = torch.arange(width)
    flat_queries, flat_keys = (torch.cat(each) for each in (queries, keys))
    plain = torch.equal(flat_queries, as_it_is)  # the outputs then lie where the columns do
    return Layout(
        batches,
        queries_M=None if plain else on_device(flat_queries, device),
        keys_M=None if torch.equal(flat_keys, as_it_is) else on_device(flat_keys, device),
        source_W=None if plain else on_device(source, device),
        shared=sum(len(span.keys) for span in spans) > width,
        sequence=sequence,
    )


def by_length(spans: Sequence[Span], batch_cost: float) -> list[list[Span]]:
    """Spans from long to short in batches, a new batch if padding would cost more."""
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
    lengths = [len(columns) for columns in own]
    tokens = sum(lengths)
    repeated = len(own) * start + tokens
    whole = sum((start + length) ** 2 for length in lengths) / 2 + KEY_COST * repeated
    alone = start**2 / 2 + KEY_COST * start
    behind = alone + MASKED_COST * sum(length * (start + length) for length in lengths) + KEY_COST * repeated
    together = alone + MASKED_COST * tokens * (start + tokens) + KEY_COST * (start + tokens)
    if len(own) > 1 and together < min(whole, behind):
        every = [column for columns in own for column in columns]
        return [Span(list(prompt), start, start), Span([*prompt, *every], tokens, tokens, lengths)]
    keys = [[*prompt, *columns] for columns in own]
    if whole <= behind:
        reads = [len(keys[0]), *lengths[1:]]
        return [Span(each, len(each), read) for each, read in zip(keys, reads, strict=True)]
    return [
        Span(list(prompt), start, start),
        *(Span(each, length, length) for each, length in zip(keys, lengths, strict=True)),
    ]


def spans_of_examples(lengths: Sequence[int]) -> list[Span]:
    """Examples end to end, each of which sees itself alone."""
    spans, start = [], 0
    for length in lengths:
        spans.append(Span(range(start, start + length), length, length))
        start += length
    return spans


def packed_inputs(input_ids_1W: Tensor, layout: Layout, position_ids_1W: Tensor) -> dict[str, Any]:
    """The model's inputs for one packed row."""
    return {"input_ids": input_ids_1W, "position_ids": position_ids_1W, "packed_layout": layout}
