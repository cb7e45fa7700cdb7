"""How far a correctly computed weight can lie from its exact value: tells rounding from another policy."""

from __future__ import annotations

import torch
from torch import Tensor

SAFETY = 1.01
"""Of each bound, for terms of second order."""


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
    rank = down.shape[0]
    products = abs(scaling) * _product(up.abs(), down.abs())
    added = 2 + rank // 64  # matrix products add to W once for each block of the sum, and blocks are longer than that
    in_float32 = unit(torch.float32) * (added * base.abs() + (rank + 3) * products) if rank else 0.0
    return exact, SAFETY * (in_float32 + unit(dtype) * exact.abs()) + torch.finfo(dtype).tiny


def _product(up_OR: Tensor, down_RC: Tensor) -> Tensor:
    """BA, column by column: for a few columns a CPU's matrix product waits longer for its threads than it computes."""
    return torch.stack([up_OR.mv(column) for column in down_RC.unbind(1)], dim=1)


def scaled_exactly(up: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(s·B in float64, the most that rounding B and the product to `dtype` can be away from it)."""
    exact = scaling * up.double()
    return exact, SAFETY * 2 * unit(dtype) * exact.abs() + torch.finfo(dtype).tiny


def beyond(held: Tensor, exact: Tensor, bound: Tensor) -> float:
    """How many times its bound the worst element is off: at most 1 if computed correctly; NaN is infinite."""
    ratio = (held.double() - exact).abs() / bound
    return float(torch.nan_to_num(ratio, nan=torch.inf).max()) if ratio.numel() else 0.0
