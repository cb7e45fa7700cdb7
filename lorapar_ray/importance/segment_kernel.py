"""The Triton kernel of `segments`: sums of per-example products and of their squares in one read of the inputs."""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

NARROW, BROAD = 32, 64
"""Columns of `wide` per program: few where there are few columns, so that every multiprocessor has work."""
MANY_COLUMNS = 8192
MOST_ROWS = 64
"""Rows per program. A group of layers has the sum of their ranks, up to thousands: a tile of so many fits neither the
registers nor the shared memory of a multiprocessor."""


@triton.jit
def segment_sums(  # type: ignore[no-untyped-def]
    small,
    wide,
    offsets,
    first,
    second,
    examples,
    columns,
    wide_stride,
    out_row,
    out_column,
    scale,
    rows: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_tokens: tl.constexpr,
    precision: tl.constexpr,
):
    """Each program owns a tile of `first` and `second` for all examples, so the sums have one order: the batch's."""
    p = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    q = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    in_rows, in_columns = p < rows, q < columns
    total = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    squares = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    start = tl.load(offsets)
    for example in range(examples):
        end = tl.load(offsets + example + 1)
        product = tl.zeros((block_rows, block_columns), dtype=tl.float32)
        for token in range(start, end, block_tokens):
            t = (token + tl.arange(0, block_tokens)).to(tl.int64)
            mine = t < end
            u = tl.load(small + t[None, :] * rows + p[:, None], mask=in_rows[:, None] & mine[None, :], other=0.0)
            v = tl.load(
                wide + t[:, None] * wide_stride + q[None, :], mask=mine[:, None] & in_columns[None, :], other=0.0
            )
            product = tl.dot(u, v, product, input_precision=precision)
        product *= scale
        total += product
        squares += product * product
        start = end
    place = p[:, None] * out_row + q[None, :] * out_column
    here = in_rows[:, None] & in_columns[None, :]
    tl.store(first + place, tl.load(first + place, mask=here) + total, mask=here)
    tl.store(second + place, tl.load(second + place, mask=here) + squares, mask=here)


def launch(small: Tensor, wide: Tensor, offsets: Tensor, first: Tensor, second: Tensor, scale: float) -> None:
    """Add to `first` and `second` [P, Q] (equally strided) the sums over small [T, P] and wide [T, Q]."""
    small = small.to(wide.dtype).contiguous()
    wide = wide if wide.stride(-1) == 1 else wide.contiguous()
    grid, options = configuration(small.shape[1], wide.shape[1], small.element_size())
    segment_sums[grid](
        small,
        wide,
        offsets,
        first,
        second,
        len(offsets) - 1,
        wide.shape[1],
        wide.stride(0),
        *first.stride(),
        scale,
        **options,
    )


def configuration(rows: int, columns: int, element_size: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """(grid, constants) for [T, rows] by [T, columns] of elements of so many bytes."""
    block_rows = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    block_columns = BROAD if columns > MANY_COLUMNS else NARROW
    return (triton.cdiv(columns, block_columns), triton.cdiv(rows, block_rows)), {
        "rows": rows,
        "block_rows": block_rows,
        "block_columns": block_columns,
        "block_tokens": 128 if element_size == 2 else 32,
        "precision": "ieee",
        "num_warps": 4,
        "num_stages": 3,
    }
