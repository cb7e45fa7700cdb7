"""AdamW on the active elements of all parameters in one Triton kernel.

An adapter has hundreds of small matrices, so on a GPU most of an optimiser's time is kernel launches. Here a table on
the device holds every parameter's addresses; a program of the kernel takes a block of one parameter's active elements.
A step is one launch, with clipping three: block sums of squares, their total and factor, the step.

Settings and products are in double precision, moments and values are rounded to float32. Torch's fused CUDA kernel
(ATen/native/cuda/fused_adam_utils.cuh) did the same once; now it rounds β and the corrections 1 − βⁿ to float32, so its
steps have a relative error of about 1e-5. Measured against it on an H100 with torch 2.11, 41 % of the values differed,
by up to 418 units in the last place; its arithmetic, emulated on a CPU as in torch 2.13, differs from this kernel's as
often and as much. Within the kernel the compiler may fuse a multiplication and an addition: after the rounding to
float32 that can move an element by one unit in the last place, in about one of 10^8 operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorapar_ray.optim.active import active_length, local_shard, shard_groups

BLOCK = 1024
"""Active elements a program takes: several independent loads for each of its threads."""
WARPS = 4
VALUE, GRADIENT, EXP_AVG, EXP_AVG_SQ, INDEX, MASTER, LENGTH, GROUP = range(8)
"""Columns of the table: addresses, then the active length and the parameter group."""
SETTINGS = 8
"""Doubles per group: lr·decay, β1, 1-β1, β2, 1-β2, lr over the first bias correction, root of the second, ε."""


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        _kernels()
    except ImportError:
        return False
    return True


class TritonStep:
    """All parameters of an optimiser, on one device, of one dtype and none longer than 2^31."""

    def __init__(self, groups: Sequence[dict[str, Any]], states: Any) -> None:
        """Take the optimiser's `param_groups` and `state`; see `TritonStep.takes`."""
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.states = [states[parameter] for parameter in self.parameters]
        self._whole = not any(hasattr(parameter, "to_local") for parameter in self.parameters)
        self.device = local_shard(self.parameters[0]).device
        self.dtype = self.parameters[0].dtype
        self.shards = {groups_of for groups_of in map(shard_groups, self.parameters) if groups_of}
        self._table = np.zeros((len(self.parameters), 8), dtype=np.int64)
        for number, (state, row) in enumerate(zip(self.states, self._table, strict=True)):
            row[LENGTH] = active_length(self.parameters[number], state["index"])
            for column, name in ((EXP_AVG, "exp_avg"), (EXP_AVG_SQ, "exp_avg_sq"), (INDEX, "index")):
                row[column] = 0 if state[name] is None else state[name].data_ptr()
            row[MASTER] = state["master"].data_ptr() if "master" in state else 0
        self._table[:, GROUP] = np.repeat(np.arange(len(groups)), [len(group["params"]) for group in groups])
        self.blocks = torch.from_numpy(blocks_of(self._table[:, LENGTH])).to(self.device)
        self.table = torch.from_numpy(self._table).to(self.device)
        self.settings = torch.zeros(len(groups), SETTINGS, dtype=torch.float64, device=self.device)
        self.sums = torch.zeros(max(1, len(self.blocks)), dtype=torch.float32, device=self.device)
        self.norm = torch.zeros(2, dtype=torch.float32, device=self.device)
        """The gradients' joint norm and the factor that clips them."""
        self._addresses: list[int] = []

    @staticmethod
    def takes(groups: Sequence[dict[str, Any]], states: Any) -> bool:
        """Whether one launch can update these parameters."""
        parameters = [parameter for group in groups for parameter in group["params"]]
        shards = [local_shard(parameter) for parameter in parameters]
        spread = set(map(shard_groups, parameters))
        return (
            bool(shards)
            and len({(shard.device, shard.dtype) for shard in shards}) == 1
            and shards[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
            and len(spread) == 1  # otherwise squares of shards and of replicas are summed apart
            and all(shard.numel() < 2**31 and shard.is_contiguous() for shard in shards)
            and has_triton()
        )

    def gradients(self) -> list[Tensor] | None:
        """This rank's gradients; None if the kernel does not support them, or a parameter has no gradient."""
        found = [parameter.grad for parameter in self.parameters]
        if any(gradient is None for gradient in found):
            return None
        if not self._whole:
            found = [local_shard(gradient) for gradient in found]
        dtype = found[0].dtype
        if all(gradient.dtype is dtype and gradient.is_contiguous() for gradient in found):
            return found
        return None

    def same_step(self) -> bool:
        """Whether all parameters have the same step count."""
        first = self.states[0]["step"]
        return all(state["step"] == first for state in self.states)

    def point_at(self, gradients: Sequence[Tensor]) -> None:
        """Update the table's addresses; they rarely change, and then one small copy to the device is enough."""
        values = self.parameters if self._whole else [local_shard(parameter) for parameter in self.parameters]
        addresses = [value.data_ptr() for value in values]
        addresses += [gradient.data_ptr() for gradient in gradients]
        if addresses != self._addresses:
            self._table[:, [VALUE, GRADIENT]] = np.array(addresses, dtype=np.int64).reshape(2, -1).T
            _upload(self._table, self.table)
            self._addresses = addresses

    def joint_norm(self, gradients: Sequence[Tensor], max_norm: float) -> Tensor:
        """The joint norm of the active gradients, over all shards if sharded; sets the `factor` that clips them."""
        if len(self.blocks):
            grid, dtype = (len(self.blocks),), _triton_dtype(gradients[0].dtype)
            _kernels()["squares"][grid](self.table, self.blocks, self.sums, GRAD=dtype, BLOCK=BLOCK, num_warps=WARPS)
        if self.shards:
            square = self.sums.double().sum()
            for groups in self.shards:
                for group in groups:
                    torch.distributed.all_reduce(square, group=group)
            self.norm[0] = square.sqrt()
            self.norm[1] = (max_norm / (self.norm[0] + 1e-6)).clamp(max=1.0)
        else:
            _kernels()["factor"][(1,)](
                self.sums, len(self.sums), self.norm, float(max_norm), BLOCK=BLOCK, num_warps=WARPS
            )
        return self.norm[0].clone()

    @property
    def factor(self) -> Tensor:
        """The factor for gradients from the last `joint_norm`."""
        return self.norm[1]

    def step(
        self, groups: Sequence[dict[str, Any]], gradients: Sequence[Tensor], *, clip: bool, only_finite: bool = False
    ) -> None:
        """One AdamW step of every parameter, its gradient multiplied by `factor` if `clip`.

        Args:
            only_finite: change nothing but the step counts if the last `joint_norm` is not finite; the device decides.
        """
        number = self.states[0]["step"] + 1
        for state in self.states:
            state["step"] = number
        if not len(self.blocks):
            return
        _upload(np.array([settings_of(group, number) for group in groups]), self.settings)
        _kernels()["adamw"][(len(self.blocks),)](
            self.table,
            self.blocks,
            self.settings,
            self.norm,
            PARAM=_triton_dtype(self.dtype),
            GRAD=_triton_dtype(gradients[0].dtype),
            CLIP=clip,
            ONLY_FINITE=only_finite,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def blocks_of(lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """int32 [blocks, 2]: each block's parameter and its first active element."""
    counts = -(-lengths // BLOCK)
    members = np.repeat(np.arange(len(lengths)), counts)
    starts = (np.arange(len(members)) - np.repeat(np.cumsum(counts) - counts, counts)) * BLOCK
    return np.stack([members, starts], axis=1).astype(np.int32)


def settings_of(group: dict[str, Any], number: int) -> list[float]:
    """A group's settings at step `number` (from 1); corrections and step size are rounded to float32."""
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    correction1 = float(np.float32(1 - beta1**number))
    correction2 = float(np.float32(sqrt(1 - beta2**number)))
    step_size = float(np.float32(rate / correction1))
    return [
        rate * group["weight_decay"], beta1, 1 - beta1, beta2, 1 - beta2, step_size, correction2, float(group["eps"])
    ]  # fmt: skip


def _upload(values: np.ndarray[Any, Any], to: Tensor) -> None:
    """Copy to the device without waiting for it: CUDA takes pageable memory's content before the call returns."""
    to.copy_(torch.from_numpy(values), non_blocking=True)


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@cache
def _kernels() -> dict[str, Any]:
    from lorapar_ray.optim import triton_kernels

    return {
        "adamw": triton_kernels.adamw,
        "squares": triton_kernels.squares,
        "factor": triton_kernels.factor,
    }
