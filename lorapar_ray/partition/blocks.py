"""Scores as a stream of blocks of float32 bit patterns; their order defines an element's position.

Positions: keys in sorted order, row-major inside a tensor. A finite non-negative float32 sorts as its bit pattern read
as an integer, so all later code compares and counts integers, and rounding cannot depend on how work is split.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorapar_ray.errors import UserError

BLOCK_ELEMENTS = 1 << 22
"""Elements that one thread processes at a time: 16 MiB of scores, small compared with an adapter that needs threads."""

INFINITY_BITS = 0x7F80_0000
_MINUS_ZERO_BITS = 0x8000_0000

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Block:
    """A run of consecutive elements of one tensor: `bits` is uint32, the elements from `start` of the flat tensor."""

    key: str
    start: int
    bits: NDArray[np.uint32]


def blocks(scores: Mapping[str, Tensor]) -> Iterator[Block]:
    """Every element of `scores` once, in position order, without copying contiguous tensors.

    Raises:
        UserError: a tensor is not float32, or holds NaN, infinity or a negative score.
    """
    for key in sorted(scores):
        flat = _flat_bits(key, scores[key])
        for start in range(0, flat.size, BLOCK_ELEMENTS):
            yield Block(key, start, flat[start : start + BLOCK_ELEMENTS])


def checked_bits(block: Block) -> NDArray[np.uint32]:
    """The block's bits, after checking that each is a valid score; −0.0 becomes 0.

    Raises:
        UserError: NaN, infinity or a negative score.
    """
    if block.bits.max(initial=0) < INFINITY_BITS:
        return block.bits
    bits = np.where(block.bits == _MINUS_ZERO_BITS, np.uint32(0), block.bits)
    bad = np.flatnonzero(bits >= INFINITY_BITS)
    if bad.size:
        value = float(bits[bad[:1]].view(np.float32)[0])
        raise UserError(
            f"scores of '{block.key}': element {block.start + int(bad[0])} is {value}; "
            "importance must be finite and not negative, score again"
        )
    return bits


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int | None) -> Iterator[Result]:
    """`map` over threads, results in the order of `items`, with only a few results alive at a time.

    `workers` None: one thread per core, at most eight; with more, memory bandwidth is the limit.
    """
    workers = workers or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def same_layout(first: Mapping[str, Tensor], second: Mapping[str, Tensor], what: str) -> None:
    """Check that both mappings have the same keys and shapes.

    Raises:
        UserError: they differ; the message contains `what` and the first different key.
    """
    for key in sorted(first.keys() | second.keys()):
        if key not in first or key not in second:
            raise UserError(f"{what}: '{key}' is in only one of them; both must come from the same adapter")
        if first[key].shape != second[key].shape:
            shapes = f"{tuple(first[key].shape)} and {tuple(second[key].shape)}"
            raise UserError(f"{what}: '{key}' has shapes {shapes}; both must come from the same adapter")


def _flat_bits(key: str, tensor: Tensor) -> NDArray[np.uint32]:
    if tensor.dtype != torch.float32:
        raise UserError(f"scores of '{key}' are {tensor.dtype}; importance scores are torch.float32")
    flat: NDArray[np.float32] = tensor.detach().cpu().contiguous().reshape(-1).numpy()
    return flat.view(np.uint32)
