"""Seeded samples of an adapter's elements, spread evenly over its positions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def spread(population: int, size: int, seed: int) -> NDArray[np.int64]:
    """`size` distinct ascending positions below `population`, one random position in each of `size` equal intervals.

    All positions if `population` is not larger. Needs memory for the sample only.
    """
    if population <= size:
        return np.arange(population)
    edges = np.arange(size + 1) * population // size
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def gather(tensors: Mapping[str, Tensor], positions: NDArray[np.int64]) -> Tensor:
    """The elements at ascending `positions` of all tensors flattened in sorted key order, as one 1-D tensor."""
    pieces, start = [], 0
    for key in sorted(tensors):
        flat = tensors[key].reshape(-1)
        low, high = np.searchsorted(positions, [start, start + flat.numel()])
        whole = high - low == flat.numel()
        pieces.append(flat if whole else flat[torch.from_numpy(positions[low:high] - start)])
        start += flat.numel()
    return torch.cat(pieces)
