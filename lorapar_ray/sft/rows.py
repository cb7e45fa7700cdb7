"""A micro-batch as tensors: the tokens, and the positions with a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST = 16
"""The smallest bucket, and the smallest step between two."""
Shape = tuple[int, int, int, bool, int]
"""B, T, N, whether rows are packed, and the number of adapters."""


@dataclass(frozen=True)
class Rows:
    """B rows of T tokens, padded on the right, of which N have a loss.

    Padding needs no mask: under causal attention no token sees later tokens, and padding has no loss.
    """

    input_ids: Tensor
    """int64 [B, T]."""
    position_ids: Tensor | None
    """int64 [B, T], beginning again with each example of a packed row; None: one example a row."""
    places: Tensor
    """int64 [N]: place in the flat [B·T] of the token before each that has a loss, whose logits predict it."""
    targets: Tensor
    """int64 [N]: the tokens that have a loss."""
    weights: Tensor
    """int64 [N]: 1, and 0 for entries that only fill up a bucket."""
    arm_N: Tensor | None = None
    """int64 [N]: which adapter's loss each is, where several train together; None: there is one."""
    arms: int = 1
    """Adapters that the rows belong to, B / arms rows each, one adapter's after the other's."""

    @property
    def shape(self) -> Shape:
        """The key of a CUDA graph."""
        return (*self.input_ids.shape, len(self.places), self.position_ids is not None, self.arms)

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        some = [self.input_ids, self.position_ids, self.places, self.targets, self.weights, self.arm_N]
        return [tensor for tensor in some if tensor is not None]

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device; a GPU is not waited for."""
        if device.type == "cpu":
            return self
        flat = torch.cat([tensor.flatten() for tensor in self.tensors()]).pin_memory().to(device, non_blocking=True)
        return rows_in(flat, self.shape)


def rows_in(flat: Tensor, shape: Shape) -> Rows:
    """Rows of a shape as views of one int64 buffer, in the order of `Rows.tensors`."""
    rows, length, losses, packed, arms = shape
    sizes = [rows * length] * (1 + packed) + [losses] * (3 + (arms > 1))
    parts = list(flat.split(sizes))
    ids = parts.pop(0).view(rows, length)
    positions = parts.pop(0).view(rows, length) if packed else None
    owners = parts.pop() if arms > 1 else None
    places, targets, weights = parts
    return Rows(ids, positions, places, targets, weights, owners, arms)


def collate(
    rows: Sequence[Sequence[dict[str, Any]]], *, packed: bool, filler: int, buckets: int = 0, arms: int = 1
) -> Rows:
    """Lay examples ({input_ids, response_start}) out as `rows` says; a row without any has no loss.

    Args:
        packed: each example of a row attends to itself alone.
        filler: the token to fill up with.
        buckets: fill T up to one of so many sizes per octave, and N to a power of two, so that few shapes occur; N
            matters to the output head alone. 0: fill nothing up.
        arms: adapters that train together; as many rows of each, one adapter's after the other's.
    """
    lengths = [sum(len(example["input_ids"]) for example in row) for row in rows]
    length = max(2, *lengths)
    if buckets:
        length = bucket(length, buckets)
    ids = torch.full((len(rows), length), filler)
    positions = torch.arange(length).repeat(len(rows), 1)
    places: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, row in enumerate(rows):
        at = 0
        for example in row:
            tokens, start = example["input_ids"], max(1, example["response_start"])
            ids[number, at : at + len(tokens)] = torch.tensor(tokens)
            positions[number, at : at + len(tokens)] = torch.arange(len(tokens))
            first = number * length + at
            places += range(first + start - 1, first + len(tokens) - 1)
            targets += tokens[start:]
            owners += [number * arms // len(rows)] * (len(tokens) - start)
            at += len(tokens)
        positions[number, at:] = torch.arange(length - at)
    fill = bucket(max(1, len(places)), 1) - len(places) if buckets else 0
    padding = [0] * fill
    weights = [1] * len(places) + padding
    return Rows(
        ids,
        positions if packed else None,
        torch.tensor(places + padding, dtype=torch.int64),
        torch.tensor(targets + padding, dtype=torch.int64),
        torch.tensor(weights, dtype=torch.int64),
        torch.tensor(owners + padding, dtype=torch.int64) if arms > 1 else None,
        arms,
    )


def bucket(size: int, parts: int) -> int:
    """The smallest multiple of 16 that is not below `size` and divides an octave (16 to 32, 32 to 64, …) into at most
    `parts` equal steps: at most 1 / `parts` more than `size`, or 15."""
    octave = LEAST
    while 2 * octave < size:
        octave *= 2
    step = max(LEAST, octave // parts)
    return max(LEAST, -(-size // step) * step)


def losses_in(examples: Sequence[dict[str, Any]]) -> int:
    """Tokens that have a loss."""
    return sum(len(example["input_ids"]) - max(1, example["response_start"]) for example in examples)
