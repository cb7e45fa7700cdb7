"""Attention of short sequences in 16 bits on a CPU: two products and a softmax.

Torch's fused attention never holds the weights of all pairs, which pays for long sequences only. Forward and backward
pass together took it 26 ms for 8 sequences of 100 tokens (9 heads of 64, bfloat16, one core of an AMD EPYC with
AVX-512), the products 6 ms; for 2 of 512 tokens 54 and 28 ms. Above, and in float32, the fused kernel is as fast.

The products are rounded to 16 bits before the softmax, which the fused kernel does not do. For 8 sequences of 100
tokens of normally distributed queries, keys and values the output has a relative error of 0.0030 in bfloat16 (fused:
0.0019), and 0.0088 (0.0015) with three times as large queries and keys. Products in float32 have the fused kernel's
error, but took 1.9 times as long as these, and for 2 sequences of 512 tokens 2.4 times, no less than the fused kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_KEYS = 512


def fits(queries: Tensor, keys: Tensor) -> bool:
    """Whether `attend` is the faster way; shapes as there."""
    return queries.device.type == "cpu" and queries.dtype.itemsize == 2 and keys.shape[2] <= MOST_KEYS


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Outputs [n, heads, Q, D]; the weights of all pairs are kept for the backward pass, 2 bytes each.

    Args:
        queries: [n, heads, Q, D].
        keys: [n, groups, K, D]; each group serves heads / groups heads that follow each other.
        values: the same.
        mask: [n or 1, 1, Q, K], additive.
        scaling: of the products; None: 1 / √D.
    """
    n, heads, Q, D = queries.shape
    groups, K = keys.shape[1], keys.shape[2]
    scaled = queries * (D**-0.5 if scaling is None else scaling)
    products = scaled.reshape(n, groups, -1, D) @ keys.transpose(2, 3)
    weights = torch.softmax(products.view(n, heads, Q, K) + mask, -1).to(values.dtype)
    return (weights.view(n, groups, -1, K) @ values).view(n, heads, Q, D)
