"""Collective operations of a group of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def of_rank_0(value: T, world: int) -> T:
    """Rank 0's `value`, a JSON value, on every rank: what each rank would choose by itself may differ, since a node's
    view of a shared file system may lag."""
    if world == 1:
        return value
    import torch.distributed as dist

    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def most_of_any_rank(count: int, device: torch.device) -> int:
    """The largest `count` among the ranks."""
    import torch.distributed as dist

    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


@torch.no_grad()
def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, with one all-reduce for all of them."""
    import torch.distributed as dist

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(own) for part, own in zip(parts, tensors, strict=True)])
