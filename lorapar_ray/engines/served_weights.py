"""Reads back what an engine computes with after a `merged` load, and compares it with base + s·BA.

Runs inside vLLM's worker. A linear layer answers exactly: for the one-hot input e_j it returns column j of its weight,
bit for bit (one product with 1, the others with 0), in whatever layout its kernel keeps the weight. So after every load
a few columns of each adapted module are compared with their exact values, up to the rounding of a correct computation.
Which columns is drawn from the policy's digest, so they differ from sync to sync. This detects steps that are far too
small for canary tokens: any that changes a drawn column by more than that rounding.

On a GPU the columns are read from the tensors that CUDA graphs captured. A module whose weights cannot be read in this
way is left out, and canary tokens alone verify it: a quantised one, one of a parallel class not listed in `part_of`,
and one whose weights vLLM transforms while loading (known before the first policy: its columns are not the file's).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.engines.base_weights import BaseWeights, KeptWeights
from lorapar_ray.engines.rounding import Item, beyond, merged_exactly, worst
from lorapar_ray.mergeable import PREFIX
from lorapar_ray.transfer import on_device

COLUMNS = 4
"""Columns of each module that are compared at a sync: together they cost one or two decoding steps."""


@dataclass(frozen=True)
class Part:
    """Where a rank holds its part of a checkpoint weight [out, in]."""

    module: Any
    first: int
    """First row in the module's output."""
    rows: slice
    """The checkpoint's rows."""
    columns: slice
    """The checkpoint's columns."""


def part_of(model: Any, path: str, name: str) -> Part | None:
    """The part of the checkpoint weight `name` that this rank's module `path` holds; None if it cannot be read."""
    from vllm.model_executor.layers import linear

    module = model.get_submodule(path)
    if not isinstance(getattr(module, "quant_method", None), linear.UnquantizedLinearMethod):
        return None
    kind, rank = type(module), module.tp_rank
    if kind is linear.ReplicatedLinear:
        return Part(module, 0, slice(None), slice(None))
    if kind is linear.RowParallelLinear:
        width = module.input_size_per_partition
        return Part(module, 0, slice(None), slice(rank * width, (rank + 1) * width))
    if kind not in (linear.ColumnParallelLinear, linear.MergedColumnParallelLinear, linear.QKVParallelLinear):
        return None
    stacked = getattr(model, "packed_modules_mapping", {}).get(path.rpartition(".")[2], ())
    own = name.rpartition(".")[0].rpartition(".")[2]
    sizes, place = module.output_partition_sizes, stacked.index(own) if own in stacked else 0
    if len(sizes) > 1 and own not in stacked:
        return None  # one checkpoint tensor for several parts
    shard = rank // module.num_kv_head_replicas if kind is linear.QKVParallelLinear and place else rank
    size = sizes[place]
    return Part(module, sum(sizes[:place]), slice(shard * size, (shard + 1) * size), slice(None))


@torch.no_grad()
def held_columns(module: Any, columns: Tensor) -> Tensor:
    """[out, C]: columns of the weight that the module computes with."""
    if module.weight.is_cuda:
        return module.weight[:, columns]
    width = getattr(module, "input_size_per_partition", module.input_size)
    asked = torch.nn.functional.one_hot(columns, width).to(module.params_dtype)
    answers: Tensor = module.quant_method.apply(module, asked, None)
    return answers.t()


@torch.no_grad()
def unlike(
    model: Any,
    paths: Mapping[str, str],
    base: BaseWeights | KeptWeights,
    state: Mapping[str, Tensor],
    scaling: float,
    digest: str,
    dtype: torch.dtype,
) -> dict[str, float]:
    """The weights that are not the policy's, and how far the worst element of each is off, in bounds of rounding.

    Args:
        paths: the model's module by checkpoint name of each weight to compare; each has a `part_of`.
        base: the base's tensors.
        state: A [r, in] and B [out, r] by adapter key; a weight without them must be the base's.
        digest: from which the columns are drawn.
        dtype: of the computation.
    """
    items: list[Item] = []
    held: dict[str, tuple[Tensor, Tensor]] = {}  # several weights may lie in one module
    for name, path in paths.items():
        part = part_of(model, path, name)
        if part is None:
            raise ValueError(f"the module of '{name}' cannot be read")
        if path not in held:
            width = getattr(part.module, "input_size_per_partition", part.module.input_size)
            columns = drawn(f"{digest} {path}", width)
            held[path] = columns, held_columns(part.module, on_device(columns, base.device))
        columns, answers = held[path]
        columns = columns + (part.columns.start or 0)
        own = base.columns(name, columns)[part.rows]
        key = f"{PREFIX}{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in state:
            down = state[f"{key}.lora_A.weight"][:, on_device(columns, base.device)]
            up = state[f"{key}.lora_B.weight"][part.rows]
        else:
            down, up = own.new_zeros(0, len(columns)), own.new_zeros(len(own), 0)
        items.append((None, (answers[part.first : part.first + len(own)], own, down, up)))

    def off(_: None, answers: Tensor, own: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return beyond(answers, *merged_exactly(own, down, up, scaling, dtype))

    found = zip(paths, worst(items, off, together=base.device.type != "cpu"), strict=True)
    return {name: times for name, times in found if times > 1}


def drawn(seed: str, width: int) -> Tensor:
    """Up to COLUMNS different columns of `width`, always the same for a seed."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    return torch.randint(width, (COLUMNS,), generator=generator).unique()


def complaint(off: Mapping[str, float], compared: int) -> str:
    """One clause about the weights that differ; empty if there are none."""
    if not off:
        return ""
    worst = max(off, key=lambda name: off[name])
    return (
        f"{len(off)} of {compared} modules compute with other weights, most of all '{worst}' "
        f"({off[worst]:.3g} times what rounding explains)"
    )
