"""AdamW that stores and touches active elements only.

Masking the gradient under a stock AdamW freezes nothing: weight decay and stale moments still move a "frozen" element.
Here an inactive element has no moments and never enters the arithmetic, so decay, momentum,
clipping and loss scaling do not change its bits; and the optimiser's memory is the active share of AdamW's.

How a step runs: the active elements of several parameters are gathered into one flat chunk, torch's own
AdamW kernel steps the chunk, and the values are scattered back. An adapter has hundreds of small matrices; a few flat
chunks need a few kernels. Where every element is active, the kernel steps the parameters themselves. On a GPU with
Triton one kernel does all of it for all parameters (`triton_step`); on a CPU with float32, gathering, stepping and
scattering are one loop (`lorapar_ray.cpu.one_pass`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.cpu.one_pass import fits, one_pass
from lorapar_ray.optim.active import (
    active_length,
    active_positions,
    compute_dtype,
    gather,
    local_shard,
    padded,
    scatter,
    shard_groups,
    side_by_side,
    split_flat,
)
from lorapar_ray.optim.kernel import torch_adamw
from lorapar_ray.optim.triton_step import TritonStep

MOMENTS = ("exp_avg", "exp_avg_sq")
TRITON_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets its kernels, as in their tests; they then accept a CPU's tensors too."""
WORTH_COMPILING = 2**28
"""Active elements of a group, times its steps, after which the compiled pass is used: it has to save the 3 s that its
compilation takes. Before, torch's kernel gives the same bits."""


@dataclass(frozen=True)
class Chunk:
    """Parameters that are updated together: of one kind, their state contiguous in flat buffers."""

    parameters: list[nn.Parameter]
    flat: dict[str, Tensor]
    """`exp_avg`, `exp_avg_sq` and, below float32, `master`, of a length that is a multiple of LANES; each parameter's
    state holds its own slice of them."""


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) on the active elements of each parameter.

    In float32 and float64 every active element takes the same bits as under `torch.optim.AdamW(fused=True)`, or with
    `fused=False` as under `torch.optim.AdamW(foreach=False)`: the same function runs on the gathered elements, or a
    loop that was tested to give the same bits. One exception: on a CPU torch's fused kernel rounds the last elements of
    a tensor whose length is no multiple of LANES differently from the rest, and which elements are the last is not the
    same here. There a step may differ by the rounding of a few operations, as torch's own two ways do. On a GPU the
    Triton kernel computes more precisely than torch's: values differ by less than 1e-4 of the learning rate and one
    last place in a step (`triton_step`). Parameters of lower precision are stepped through float32 master values, which
    stock AdamW does not keep.

    State per parameter: `step`, `index` (flat positions, int32 where they fit; none if all are active), and flat
    `exp_avg`, `exp_avg_sq` and, below float32, `master`, all of the active length.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        fused: bool = True,
    ) -> None:
        """`params`: groups with `params` and `masks` (bool tensors in the parameters' shapes, None: all active).

        A sharded parameter (DTensor) takes its whole mask, or a DTensor mask of the same placements. State is kept, and
        by `state_dict` saved, for this rank's shard. `fused` picks torch's kernel: one pass over memory, or (False) a
        sequence of elementary operations, slower by several times.

        Raises:
            ValueError: a setting out of range, or masks that do not fit their parameters.
        """
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"need lr, eps, weight_decay >= 0 and betas in [0, 1), got {lr}, {eps}, {weight_decay}, {betas}"
            )
        self._fused = fused
        self._chunks: list[list[Chunk]] = []
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._triton: TritonStep | None = None
        self._triton_was_tried = False
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; `param_group` may contain `masks`.

        Raises:
            ValueError: masks that do not fit their parameters.
        """
        masks = param_group.get("masks")
        super().add_param_group({name: value for name, value in param_group.items() if name != "masks"})
        parameters = self.param_groups[-1]["params"]
        masks = [None] * len(parameters) if masks is None else masks
        if len(masks) != len(parameters):
            raise ValueError(f"{len(parameters)} parameters but {len(masks)} masks in one group")
        indices = [active_positions(parameter, mask) for parameter, mask in zip(parameters, masks, strict=True)]
        self._chunks.append([self._make_chunk(members) for members in side_by_side(parameters, indices)])
        self._triton, self._triton_was_tried = None, False

    def _make_chunk(self, members: list[tuple[nn.Parameter, Tensor | None]]) -> Chunk:
        local = local_shard(members[0][0])
        sizes = [active_length(parameter, index) for parameter, index in members]
        dtype = compute_dtype(local)
        names = (*MOMENTS, "master") if dtype != local.dtype else MOMENTS
        flat = {name: torch.zeros(padded(sum(sizes)), dtype=dtype, device=local.device) for name in names}
        slices = {name: split_flat(buffer, sizes) for name, buffer in flat.items()}
        if "master" in flat:
            for (parameter, index), values in zip(members, slices["master"], strict=True):
                gather(local_shard(parameter), index, values)
        for number, (parameter, index) in enumerate(members):
            self.state[parameter] = {
                "step": 0,
                "index": index,
                **{name: slices[name][number] for name in flat},
            }
        return Chunk([parameter for parameter, _ in members], flat)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; parameters without a gradient are skipped, as in AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self._for_one_launch()
        if gradients is not None and self._triton is not None:
            self._triton.step(self.param_groups, gradients, clip=False)
            return loss
        for group, chunks in zip(self.param_groups, self._chunks, strict=True):
            for chunk in () if self._step_in_one_pass(group) else chunks:
                moving = [parameter for parameter in chunk.parameters if parameter.grad is not None]
                together = len(moving) == len(chunk.parameters)
                if together and len({self.state[parameter]["step"] for parameter in moving}) == 1:
                    self._step_together(moving, chunk.flat, group)
                else:
                    for parameter in moving:
                        self._step_alone(parameter, tuple(chunk.flat), group)
        return loss

    @torch.no_grad()
    def clip_and_step(self, max_norm: float, only_finite: bool = False) -> Tensor:
        """`clip_grad_norm_`, then `step`; returns the norm, on the parameters' device, without waiting for it.

        On a GPU these are three launches, and the gradients themselves are not changed: only the step uses the clipped
        ones.

        Args:
            only_finite: change no value and no moment if the norm is not finite. The step counts all the same in the
                bias corrections of later steps, since on a GPU only the device knows.
        """
        gradients = self._for_one_launch()
        if gradients is None or self._triton is None:
            norm = self.clip_grad_norm_(max_norm)
            if not only_finite or norm.isfinite():
                self.step()
            else:
                self._count_a_step()
            return norm
        norm = self._triton.joint_norm(gradients, max_norm)
        self._triton.step(self.param_groups, gradients, clip=True, only_finite=only_finite)
        return norm

    def _count_a_step(self) -> None:
        """As `step`, without any change of values and moments."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1

    def _for_one_launch(self) -> list[Tensor] | None:
        """The gradients, with `_triton` ready for the step; None if this step uses another path."""
        if not self._triton_was_tried:
            self._triton_was_tried = True
            on_gpu = all(local_shard(p).is_cuda for group in self.param_groups for p in group["params"])
            if self._fused and (on_gpu or TRITON_ON_CPU) and TritonStep.takes(self.param_groups, self.state):
                self._triton = TritonStep(self.param_groups, self.state)
        if self._triton is None or not self._triton.same_step():
            return None
        gradients = self._triton.gradients()
        if gradients is not None:
            self._triton.point_at(gradients)
        return gradients

    def _step_in_one_pass(self, group: dict[str, Any]) -> bool:
        """Step a whole group at once if `one_pass` supports its parameters; returns whether it did."""
        parameters = group["params"]
        states = [self.state[parameter] for parameter in parameters]
        indices = [state["index"] for state in states]
        gradients = [parameter.grad for parameter in parameters]
        if (
            not self._fused
            or sum(state["exp_avg"].numel() * state["step"] for state in states) < WORTH_COMPILING
            or all(index is None for index in indices)
            or any(gradient is None for gradient in gradients)
            or len({state["step"] for state in states}) > 1
        ):
            return False
        values, gradients = ([local_shard(each) for each in tensors] for tensors in (parameters, gradients))
        step = one_pass() if fits(values, gradients, indices) else None
        if step is None:
            return False
        for state in states:
            state["step"] += 1
        moments = ([state[name] for state in states] for name in MOMENTS)
        step(values, gradients, indices, *moments, states[0]["step"], group)
        return True

    def _step_alone(self, parameter: nn.Parameter, names: tuple[str, ...], group: dict[str, Any]) -> None:
        """Step one parameter of a chunk whose other parameters have no gradient or another step count."""
        state = self.state[parameter]
        own = {name: state[name].new_zeros(padded(state[name].numel())) for name in names}
        for name, buffer in own.items():
            buffer[: state[name].numel()] = state[name]
        self._step_together([parameter], own, group)
        for name, buffer in own.items():
            state[name].copy_(buffer[: state[name].numel()])

    def _step_together(self, parameters: list[nn.Parameter], flat: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Step parameters with the same step count, whose state is contiguous in `flat`."""
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"] += 1
        moments = flat["exp_avg"]
        if moments.numel() == 0:
            return
        number, indices = states[0]["step"], [state["index"] for state in states]
        if "master" not in flat and all(index is None for index in indices):
            shards = [local_shard(parameter) for parameter in parameters]
            gradients = [local_shard(parameter.grad) for parameter in parameters]
            sizes = [local.numel() for local in shards]
            first, second = (
                [part.view_as(local) for part, local in zip(split_flat(flat[name], sizes), shards, strict=True)]
                for name in MOMENTS
            )
            torch_adamw(shards, gradients, first, second, number, group, fused=self._fused)
            return
        sizes = [state["exp_avg"].numel() for state in states]
        values, gradient = self._scratch_like(moments)
        for parameter, index, out in zip(parameters, indices, split_flat(gradient, sizes), strict=True):
            gather(local_shard(parameter.grad), index, out)
        gradient[sum(sizes) :].zero_()
        if "master" in flat:
            values = flat["master"]
        else:
            for parameter, index, out in zip(parameters, indices, split_flat(values, sizes), strict=True):
                gather(local_shard(parameter), index, out)
            values[sum(sizes) :].zero_()
        torch_adamw([values], [gradient], [moments], [flat["exp_avg_sq"]], number, group, fused=self._fused)
        for parameter, index, new in zip(parameters, indices, split_flat(values, sizes), strict=True):
            scatter(local_shard(parameter), index, new)

    def _scratch_like(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Two buffers of `flat`'s length, reused in each step: new memory pages would take longer than the
        arithmetic."""
        kind = flat.device, flat.dtype
        if kind not in self._scratch or self._scratch[kind].shape[1] < flat.numel():
            self._scratch[kind] = torch.empty(2, flat.numel(), dtype=flat.dtype, device=flat.device)
        values, gradients = self._scratch[kind][:, : flat.numel()]
        return values, gradients

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients so that the joint norm of the active ones is at most `max_norm`; returns it from before.

        Inactive gradients, even infinite ones, do not count. Sharded parameters (DTensor) give the norm over all
        shards, replicas counted once; every rank must call this.
        """
        gradients = self._for_one_launch()
        if gradients is not None and self._triton is not None:
            norm = self._triton.joint_norm(gradients, max_norm)
            torch._foreach_mul_(gradients, self._triton.factor)
            return norm
        squares: dict[tuple[Any, ...], Tensor] = {}
        moving: list[Tensor] = []
        for chunk in (chunk for chunks in self._chunks for chunk in chunks):
            parameters = [parameter for parameter in chunk.parameters if parameter.grad is not None]
            if parameters:
                moving += [local_shard(parameter.grad) for parameter in parameters]
                square = self._active_norm(parameters, chunk.flat["exp_avg"]).square()
                groups = shard_groups(parameters[0])
                squares[groups] = squares[groups] + square if groups in squares else square
        for groups, square in squares.items():
            for group in groups:
                torch.distributed.all_reduce(square, group=group)
        total = sum(squares.values(), start=torch.zeros(())).sqrt()
        if moving:
            torch._foreach_mul_(moving, (max_norm / (total + 1e-6)).clamp(max=1.0))
        return total

    def _active_norm(self, parameters: list[nn.Parameter], flat: Tensor) -> Tensor:
        """Joint norm of the active gradients of parameters of one chunk, whose moments are `flat`."""
        indices = [self.state[parameter]["index"] for parameter in parameters]
        if all(index is None for index in indices):
            norms = torch._foreach_norm([local_shard(p.grad) for p in parameters], dtype=flat.dtype)
            return torch.linalg.vector_norm(torch.stack(norms))
        sizes = [self.state[parameter]["exp_avg"].numel() for parameter in parameters]
        gradients = self._scratch_like(flat)[1][: sum(sizes)]
        for parameter, index, out in zip(parameters, indices, gradients.split(sizes), strict=True):
            gather(local_shard(parameter.grad), index, out)
        return torch.linalg.vector_norm(gradients)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the `moments` (with master values) and of the `index`."""
        sizes = {"moments": 0, "index": 0}
        for state in self.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    sizes["index" if name == "index" else "moments"] += value.nbytes
        return sizes

    def mask_digest(self) -> str:
        """Hex digest of the masks."""
        total = hashlib.sha256()
        for group in self.param_groups:
            for parameter in group["params"]:
                index = self.state[parameter]["index"]
                total.update(str(tuple(parameter.shape)).encode())
                total.update(b"all" if index is None else index.cpu().numpy().tobytes())
        return total.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """As in torch, without the indices (they are recomputed from the masks) and with a digest of the masks."""
        whole = super().state_dict()
        state = {
            number: {name: value for name, value in entry.items() if name != "index"}
            for number, entry in whole["state"].items()
        }
        return {"state": state, "param_groups": whole["param_groups"], "masks": self.mask_digest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume exactly.

        Raises:
            ValueError: the state was saved under other masks.
        """
        if state_dict["masks"] != self.mask_digest():
            raise ValueError(
                "this optimiser state belongs to another mask; resume with the partition it was saved under"
            )
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            entry = state_dict["state"][number]
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    self.state[parameter][name].copy_(value)
                else:
                    self.state[parameter][name] = value
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
            group["betas"] = tuple(group["betas"])
