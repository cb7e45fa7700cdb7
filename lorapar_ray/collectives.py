"""Collective operations of a group of workers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=30)
"""Longer than any wait: for nodes of a growing cluster, or for an engine that is built again. Ray finds a dead rank."""


class HostWait:
    """Where ranks wait for each other on the host, however long one of them takes.

    In a collective of NCCL they would keep their GPUs busy, which an engine may share, and end at its time limit.
    """

    def __init__(self, world: int) -> None:
        """Called by all ranks."""
        import torch.distributed as dist

        self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if world > 1 else None

    def together(self) -> None:
        """Return when every rank is here."""
        if self._group is not None:
            import torch.distributed as dist

            dist.barrier(group=self._group)


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
