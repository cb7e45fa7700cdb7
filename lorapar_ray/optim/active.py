"""The active elements of parameters: their positions, and copies to and from flat buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = {"cpu": 2**20, "cuda": 2**26}
"""Active elements updated at once: as many as fit into a CPU's cache; on a GPU as many as possible, for few
launches."""
LANES = 16
"""Elements that a CPU's vector instructions take at once, at most; chunks are filled up to a multiple."""


def active_positions(parameter: Tensor, mask: Tensor | None) -> Tensor | None:
    """Flat positions of the active elements of this rank's shard; None if all are active."""
    local = local_shard(parameter)
    if mask is None:
        return None
    if local is not parameter and not hasattr(mask, "to_local") and mask.shape == parameter.shape:
        mask = shard_like(mask.to(local.device), parameter)
    mask = local_shard(mask)
    if mask.shape != local.shape:
        raise ValueError(f"mask of shape {tuple(mask.shape)} on a parameter of shape {tuple(local.shape)}")
    if bool(mask.all()):
        return None
    index = mask.reshape(-1).nonzero().squeeze(1).to(local.device)
    return index.int() if local.numel() < 2**31 else index


def side_by_side(
    parameters: list[nn.Parameter], indices: list[Tensor | None]
) -> Iterator[list[tuple[nn.Parameter, Tensor | None]]]:
    """Runs of consecutive parameters of one kind, each with at most a chunk's elements (or one parameter)."""
    members: list[tuple[nn.Parameter, Tensor | None]] = []
    size = 0
    for parameter, index in zip(parameters, indices, strict=True):
        local, length = local_shard(parameter), active_length(parameter, index)
        room = CHUNK.get(local.device.type, CHUNK["cuda"])
        if members and (kind_of(members[0][0]) != kind_of(parameter) or size + length > room):
            yield members
            members, size = [], 0
        members.append((parameter, index))
        size += length
    if members:
        yield members


def kind_of(parameter: Tensor) -> tuple[Any, ...]:
    return parameter.device, parameter.dtype, shard_groups(parameter)


def compute_dtype(local: Tensor) -> torch.dtype:
    return torch.float64 if local.dtype == torch.float64 else torch.float32


def active_length(parameter: Tensor, index: Tensor | None) -> int:
    return local_shard(parameter).numel() if index is None else index.numel()


def local_shard(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, else the tensor itself."""
    shard = getattr(tensor, "to_local", None)
    local: Tensor = shard() if shard is not None else tensor
    return local


def shard_like(mask: Tensor, parameter: Any) -> Tensor:
    """A whole mask, sharded like its parameter: every rank takes its part, without communication."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard_groups(parameter: Any) -> tuple[Any, ...]:
    """The process groups over which a DTensor's shards are spread; none for an ordinary or a replicated tensor."""
    if not hasattr(parameter, "to_local"):
        return ()
    mesh = parameter.device_mesh
    return tuple(mesh.get_group(dim) for dim, placed in enumerate(parameter.placements) if placed.is_shard())


def padded(length: int) -> int:
    return -(-length // LANES) * LANES


def split_flat(buffer: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Consecutive parts of a flat buffer, without its padding."""
    return buffer[: sum(sizes)].split(sizes)


def select(tensor: Tensor, index: Tensor | None) -> Tensor:
    """The active elements, flat."""
    flat = tensor.reshape(-1)
    return flat if index is None else flat.index_select(0, index)


def gather(tensor: Tensor, index: Tensor | None, out: Tensor) -> None:
    """Copy the active elements into `out`, in `out`'s dtype."""
    if index is None or tensor.dtype != out.dtype:
        out.copy_(select(tensor, index))
    else:
        torch.index_select(tensor.reshape(-1), 0, index, out=out)


def scatter(tensor: Tensor, index: Tensor | None, values: Tensor) -> None:
    """Write the active elements back; other elements do not change."""
    if index is None:
        tensor.view(-1).copy_(values)
    else:  # several times faster than index_put_, though it takes 8-byte positions only
        tensor.view(-1).scatter_(0, index.long(), values.to(tensor.dtype))
