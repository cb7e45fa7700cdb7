"""The frozen base cut over a group of workers (FSDP2), the adapter whole on each.

For bases that do not fit one device. A layer's weights are gathered when it computes and dropped after, so every worker
must run the same number of forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def shard_base(peft_model: Any, device: torch.device) -> Any:
    """Cut the base over all ranks of the process group, a decoder layer at a time, and move the adapter to `device`.

    Args:
        peft_model: the whole model, in host memory; after this each rank holds its share of the base on `device`.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    from lorapar_ray.adapters import adapter_parameters

    adapter = set(adapter_parameters(peft_model).values())
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    base = peft_model.get_base_model()
    for layer in [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    fully_shard(base, mesh=mesh, ignored_params=adapter)
    return peft_model


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
