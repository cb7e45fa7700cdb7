"""Tokenised examples as batches with response-only labels: padded rows, or one row with the examples end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorapar_ray import packed_layout
from lorapar_ray.datasets.chat import NO_LOSS
from lorapar_ray.packed_layout import make_layout, spans_of_examples
from lorapar_ray.transfer import on_device

TOKENS = {"cpu": 2048, "cuda": 4096}
"""Tokens per batch by device: on a GPU enough to hide kernel launches, within 40 GB of activations at 7B."""


@dataclass(frozen=True)
class TokenizedExample:
    """Prompt and response as one token sequence."""

    id: str
    input_ids: Sequence[int]
    response_start: int


def collate(examples: Sequence[TokenizedExample], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `position_ids` and `labels`, each [B, T]; prompt tokens have no label."""
    width = max(len(example.input_ids) for example in examples)
    shape = (len(examples), width)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, NO_LOSS),
    }
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids = torch.as_tensor(example.input_ids, dtype=torch.long)
        batch["input_ids"][row, :length] = ids
        batch["attention_mask"][row, :length] = 1
        batch["position_ids"][row, :length] = torch.arange(length)
        batch["labels"][row, example.response_start : length] = ids[example.response_start :]
    return batch


def pack(examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
    """Examples end to end in one row: `input_ids`, `position_ids` and `labels` [1, T], and `lengths` [examples].

    No token is padding. `lorapar_ray.packed_layout` keeps the examples apart.
    """
    ids = [torch.as_tensor(example.input_ids, dtype=torch.long) for example in examples]
    labels = [each.clone() for each in ids]
    for each, example in zip(labels, examples, strict=True):
        each[: max(1, example.response_start)] = NO_LOSS  # nothing predicts an example's first token
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(len(each)) for each in ids])[None],
        "labels": torch.cat(labels)[None],
        "lengths": torch.tensor([len(each) for each in ids]),
    }


def by_cost(lengths: Sequence[int], tokens: int, *, padded: bool = False) -> list[list[int]]:
    """Positions of examples, longest first, in batches of at most `tokens` tokens (one longer example goes alone).

    Args:
        padded: a batch's cost is its longest example times its number of examples, not the sum of its lengths.
    """
    batches: list[list[int]] = []
    spent = 0
    for index in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        longest = lengths[batches[-1][0]] if batches and padded else lengths[index]
        if not batches or spent + longest > tokens:
            batches.append([])
            longest, spent = lengths[index], 0
        batches[-1].append(index)
        spent += longest
    return batches


@dataclass(frozen=True)
class Layout:
    """The example of each token, computed before the batch is on its device, so that no operation waits for it.

    Tokens are counted row after row; example k has those from `starts[k]` to `starts[k] + lengths[k]`.
    """

    shape: tuple[int, int]
    lengths: list[int]
    offsets: Tensor
    """[examples + 1] int32: start of each example's tokens, and the end of the last one's."""
    predicting: Tensor
    """[N] int64: the tokens whose successor is labelled."""
    targets: Tensor
    """[N] int64: those successors."""
    owner: Tensor
    """[N] int64: the example of each."""
    weights: Tensor
    """[N] float32: one over the number of labelled tokens of the example."""
    slots: Tensor | None
    """[examples · longest] int64: the tokens as padded rows, padding at token 0; None if every length is the same."""
    home: Tensor | None
    """[T] int64: the slot of each token; None if every length is the same."""
    attention: packed_layout.Layout | None
    """The layout of a packed row."""

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]


def layout_of(batch: dict[str, Any], device: torch.device) -> Layout:
    """The layout of a padded or packed batch.

    Raises:
        ValueError: an example has no labelled token.
    """
    labels: Tensor = batch["labels"].cpu()
    rows, width = labels.shape
    packed = "lengths" in batch
    lengths = batch["lengths"].tolist() if packed else [width] * rows
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    example = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    flat = labels.flatten()
    successor = torch.cat([flat[1:], flat.new_full((1,), NO_LOSS)])
    successor[ends - 1] = NO_LOSS
    predicting = (successor != NO_LOSS).nonzero()[:, 0]
    owner = example[predicting]
    counts = torch.bincount(owner, minlength=len(lengths))
    if (counts == 0).any():
        raise ValueError("an example has no labelled token; is its response empty or cut off by max_length?")
    slots = home = None
    longest = max(lengths)
    if min(lengths) != longest:
        starts = ends - sizes
        home = torch.arange(len(example)) - starts[example] + example * longest
        slots = torch.zeros(len(lengths) * longest, dtype=torch.long)
        slots[home] = torch.arange(len(example))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), ends]).int()
    tensors = (offsets, predicting, successor[predicting], owner, 1 / counts[owner])
    attention = make_layout(spans_of_examples(lengths), width, device) if packed else None
    offsets, predicting, targets, owner, weights = (on_device(each, device) for each in tensors)
    slots, home = (None if each is None else on_device(each, device) for each in (slots, home))
    return Layout(
        (rows, width),
        lengths,
        offsets,
        predicting,
        targets,
        owner,
        weights,
        slots=slots,
        home=home,
        attention=attention,
    )
