"""Σ_k G_k and Σ_k G_k² of per-example products G_k = Σ_{t in k} u_t v_tᵀ, which are never stored.

On a GPU one kernel holds a tile of G_k in registers while it reads an example's tokens, and adds it and its square to
running sums before the next example (`segment_kernel`). Elsewhere each product is formed, added and overwritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorapar_ray.importance.batching import Layout
from lorapar_ray.optim.triton_step import has_triton


def add_segment_products(
    small: Tensor, wide: Tensor, layout: Layout, first: Tensor, second: Tensor, scale: float = 1.0
) -> None:
    """Add the sums over examples, in the order of the batch, of s·G_k to `first` and of (s·G_k)² to `second`.

    Args:
        small: [T, P], a few columns.
        wide: [T, Q].
        first, second: [P, Q] float32, with any strides (a transposed view for [Q, P]).
    """
    if small.device.type == "cuda" and has_triton():
        from lorapar_ray.importance.segment_kernel import launch

        launch(small, wide, layout.offsets, first, second, scale)
    elif layout.slots is None or small.device.type == "cuda":
        _batched(small, wide, layout, first, second, scale)
    else:
        _one_after_another(small, wide, layout, first, second, scale)


def _batched(small: Tensor, wide: Tensor, layout: Layout, first: Tensor, second: Tensor, scale: float) -> None:
    """All examples of a batch as one product over padded rows."""
    count, longest = len(layout.lengths), layout.longest
    u, v = small.float().mul(scale), wide.float()
    if layout.slots is not None and layout.home is not None:
        u = u.new_zeros(count * longest, u.shape[1]).index_copy_(0, layout.home, u)
        v = v.index_select(0, layout.slots)
    products = torch.bmm(u.view(count, longest, -1).transpose(1, 2), v.view(count, longest, -1))
    first += products.sum(0)
    second += products.square_().sum(0)


def _one_after_another(
    small: Tensor, wide: Tensor, layout: Layout, first: Tensor, second: Tensor, scale: float
) -> None:
    u, v = small.float().mul(scale), wide.float()
    product = torch.empty(u.shape[1], v.shape[1], device=u.device)
    for mine, values in zip(u.split(layout.lengths), v.split(layout.lengths), strict=True):
        torch.mm(mine.T, values, out=product)
        first += product
        second.addcmul_(product, product)
