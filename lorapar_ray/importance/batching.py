"""Tokenised examples as padded batches with response-only labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorapar_ray.datasets.chat import NO_LOSS


@dataclass(frozen=True)
class TokenizedExample:
    """Prompt and response as one token sequence."""

    id: str
    input_ids: list[int]
    response_start: int


def collate(
    examples: Sequence[TokenizedExample], pad_id: int, padding_side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `position_ids` and `labels`, each [B, T]; labels leave the prompt out."""
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
        start = width - length if padding_side == "left" else 0
        ids = torch.tensor(example.input_ids)
        batch["input_ids"][row, start : start + length] = ids
        batch["attention_mask"][row, start : start + length] = 1
        batch["position_ids"][row, start : start + length] = torch.arange(length)
        batch["labels"][row, start + example.response_start : start + length] = ids[example.response_start :]
    return batch
