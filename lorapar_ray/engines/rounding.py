"""How far a correctly computed weight can lie from its exact value: tells rounding from another policy.

A matrix may have dimensions before its rows and columns: then it is several of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SAFETY = 1.01
"""Of each bound, for terms of second order."""
AT_ONCE = 2**20
"""Elements that a GPU compares at once: an array of them takes 8 MiB in float64."""
Item = tuple[Any, tuple[Tensor, ...]]
"""A kind, and the matrices to compare."""


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def merged_exactly(
    base_OC: Tensor, down_RC: Tensor, up_OR: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(W + s·BA in float64, the most that float32 arithmetic and one rounding to `dtype` can be away from it).

    Whatever the order of the sums: a sum of n products is off by at most n·u·Σ|b||a| (Higham, Accuracy and Stability
    of Numerical Algorithms, section 3.1).

    Args:
        base_OC, down_RC, up_OR: columns of W and A, and B.
    """
    base, down, up = base_OC.double(), down_RC.double(), up_OR.double()
    exact = base + scaling * _product(up, down)
    rank = down.shape[-2]
    products = abs(scaling) * _product(up.abs(), down.abs())
    added = 2 + rank // 64  # matrix products add to W once for each block of the sum, and blocks are longer than that
    in_float32 = unit(torch.float32) * (added * base.abs() + (rank + 3) * products) if rank else 0.0
    return exact, SAFETY * (in_float32 + unit(dtype) * exact.abs()) + torch.finfo(dtype).tiny


def _product(up_OR: Tensor, down_RC: Tensor) -> Tensor:
    """BA; on a CPU column by column: for a few columns its matrix product waits longer for its threads than it
    computes."""
    if up_OR.device.type != "cpu":
        return up_OR @ down_RC
    if up_OR.dim() > 2:
        return torch.stack([_product(*pair) for pair in zip(up_OR, down_RC, strict=True)])
    return torch.stack([up_OR.mv(column) for column in down_RC.unbind(1)], dim=1)


def scaled_exactly(up: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(s·B in float64, the most that rounding B and the product to `dtype` can be away from it)."""
    exact = scaling * up.double()
    return exact, SAFETY * 2 * unit(dtype) * exact.abs() + torch.finfo(dtype).tiny


def beyond(held: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """How many times its bound the worst element of each matrix is off: at most 1 if computed correctly; NaN is
    infinite."""
    ratio = (held.double() - exact).abs() / bound
    if not ratio.numel():
        return ratio.new_zeros(ratio.shape[:-2])
    return torch.nan_to_num(ratio, nan=torch.inf).amax((-2, -1))


def worst(items: Sequence[Item], measure: Callable[..., Tensor], *, together: bool) -> list[float]:
    """What `measure` says of each item, read from the device once.

    Args:
        measure: takes a kind and matrices [n, …] of n items; returns [n].
        together: compute many items in one launch, as a GPU should.
    """
    order: list[int] = []
    found: list[Tensor] = []
    for numbers, kind, matrices in _stacks(items, together):
        order += numbers
        found.append(measure(kind, *matrices))
    values = dict(zip(order, torch.cat(found).tolist(), strict=True)) if found else {}
    return [values[number] for number in range(len(items))]


def _stacks(items: Sequence[Item], together: bool) -> Iterator[tuple[list[int], Any, list[Tensor]]]:
    """(their numbers, their kind, their matrices) of items of one kind and equal shapes."""
    groups: dict[Any, list[int]] = {}
    for number, (kind, matrices) in enumerate(items):
        key = (kind, *((each.shape, each.dtype) for each in matrices)) if together else number
        groups.setdefault(key, []).append(number)
    for numbers in groups.values():
        kind, first = items[numbers[0]]
        most = max(1, AT_ONCE // max(1, *(each.numel() for each in first)))
        for start in range(0, len(numbers), most):
            part = numbers[start : start + most]
            several = zip(*(items[number][1] for number in part), strict=True)
            yield part, kind, [each[0][None] if len(each) == 1 else torch.stack(each) for each in several]
