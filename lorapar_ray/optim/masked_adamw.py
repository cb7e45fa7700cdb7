"""AdamW that stores and touches active elements only.

Masking the gradient under a stock AdamW freezes nothing: weight decay and stale moments still move a "frozen" element
(method, section 3). Here an inactive element has no moments and never enters the arithmetic, so it keeps its bits
whatever decay, momentum, clipping or loss scaling do; and the optimiser's memory is the active share of AdamW's.

How a step runs: the active elements of several parameters are gathered side by side into one flat chunk, torch's own
AdamW steps the chunk, and the values are scattered back. An adapter has hundreds of small matrices; a handful of flat
chunks costs a handful of kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

CHUNK = {"cpu": 2**20, "cuda": 2**26}
"""Active elements stepped at once: what stays in a CPU's cache; on a GPU as many as possible, to launch few kernels."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def masked_param_groups(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    *,
    lr: float,
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups for `MaskedAdamW`, in key order.

    Args:
        parameters, masks: by adapter key; a mask is bool in its parameter's shape.
        lora_plus_ratio: learning rate of the B matrices over that of the others (LoRA+, arXiv 2402.12354).
    """
    groups = []
    for is_b, rate in ((False, lr), (True, lr * lora_plus_ratio)):
        keys = [key for key in sorted(parameters) if (".lora_B." in key) == is_b]
        if keys:
            group = {"params": [parameters[key] for key in keys], "masks": [masks[key] for key in keys]}
            groups.append({**group, "lr": rate, "weight_decay": weight_decay})
    return groups


def trainable_share(masks: Mapping[str, Tensor]) -> float:
    """Active elements over all elements."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@dataclass(frozen=True)
class Chunk:
    """Parameters that are stepped together: one device, one dtype, their state side by side in flat buffers."""

    parameters: list[nn.Parameter]
    flat: dict[str, Tensor]
    """`exp_avg`, `exp_avg_sq` and, below float32, `master`; each parameter's state holds its own slice of them."""


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) on the active elements of each parameter.

    In float32 and float64 every active element takes the same bits as under `torch.optim.AdamW(foreach=False)`: the
    same function runs on the gathered elements. Parameters of lower precision are stepped through float32 master
    values, which stock AdamW does not keep.

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
    ) -> None:
        """`params`: groups with `params` and `masks` (bool tensors in the parameters' shapes, None: all active).

        A sharded parameter (DTensor) takes its whole mask, or a DTensor mask of the same placements. State is kept, and
        by `state_dict` saved, for this rank's shard.

        Raises:
            ValueError: a setting out of range, or masks that do not fit their parameters.
        """
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"need lr, eps, weight_decay >= 0 and betas in [0, 1), got {lr}, {eps}, {weight_decay}, {betas}"
            )
        self._chunks: list[list[Chunk]] = []
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; `param_group` may carry `masks`.

        Raises:
            ValueError: masks that do not fit their parameters.
        """
        masks = param_group.get("masks")
        super().add_param_group({name: value for name, value in param_group.items() if name != "masks"})
        parameters = self.param_groups[-1]["params"]
        masks = [None] * len(parameters) if masks is None else masks
        if len(masks) != len(parameters):
            raise ValueError(f"{len(parameters)} parameters but {len(masks)} masks in one group")
        indices = [_active(parameter, mask) for parameter, mask in zip(parameters, masks, strict=True)]
        self._chunks.append([self._make_chunk(members) for members in _side_by_side(parameters, indices)])

    def _make_chunk(self, members: list[tuple[nn.Parameter, Tensor | None]]) -> Chunk:
        local = _local(members[0][0])
        sizes = [_length(parameter, index) for parameter, index in members]
        dtype = _compute_dtype(local)
        flat = {name: torch.zeros(sum(sizes), dtype=dtype, device=local.device) for name in MOMENTS}
        if dtype != local.dtype:
            flat["master"] = torch.empty(sum(sizes), dtype=dtype, device=local.device)
            for (parameter, index), values in zip(members, flat["master"].split(sizes), strict=True):
                _gather(_local(parameter), index, values)
        slices = {name: buffer.split(sizes) for name, buffer in flat.items()}
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
        for group, chunks in zip(self.param_groups, self._chunks, strict=True):
            for chunk in chunks:
                moving = [parameter for parameter in chunk.parameters if parameter.grad is not None]
                together = len(moving) == len(chunk.parameters)
                if together and len({self.state[parameter]["step"] for parameter in moving}) == 1:
                    self._step_together(moving, chunk.flat, group)
                else:
                    for parameter in moving:
                        state = self.state[parameter]
                        own = {name: state[name] for name in chunk.flat}
                        self._step_together([parameter], own, group)
        return loss

    def _step_together(self, parameters: list[nn.Parameter], flat: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Step parameters at the same step count, whose state lies side by side in `flat`."""
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"] += 1
        moments = flat["exp_avg"]
        if moments.numel() == 0:
            return
        sizes = [state["exp_avg"].numel() for state in states]
        values, gradients = self._scratch_like(moments)
        for parameter, state, out in zip(parameters, states, gradients.split(sizes), strict=True):
            _gather(_local(parameter.grad), state["index"], out)
        if "master" in flat:
            values = flat["master"]
        else:
            for parameter, state, out in zip(parameters, states, values.split(sizes), strict=True):
                _gather(_local(parameter), state["index"], out)
        adamw(
            [values],
            [gradients],
            [moments],
            [flat["exp_avg_sq"]],
            [],
            [torch.tensor(states[0]["step"] - 1.0)],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, state, new in zip(parameters, states, values.split(sizes), strict=True):
            _scatter(_local(parameter), state["index"], new)

    def _scratch_like(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Two buffers of `flat`'s length, kept from step to step: fresh pages would cost more than the arithmetic."""
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
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        squares: dict[tuple[Any, ...], Tensor] = {}
        for p in moving:
            gradient = _local(p.grad)
            active = _select(gradient, self.state[p]["index"])
            norm = torch.linalg.vector_norm(active, dtype=_compute_dtype(gradient))
            groups = _shard_groups(p)
            squares[groups] = squares[groups] + norm.square() if groups in squares else norm.square()
        for groups, square in squares.items():
            for group in groups:
                torch.distributed.all_reduce(square, group=group)
        total = sum(squares.values(), start=torch.zeros(())).sqrt()
        if moving:
            torch._foreach_mul_([_local(p.grad) for p in moving], (max_norm / (total + 1e-6)).clamp(max=1.0))
        return total

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the `moments` (with master values) and of the `index`."""
        sizes = {"moments": 0, "index": 0}
        for state in self.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    sizes["index" if name == "index" else "moments"] += value.nbytes
        return sizes

    def mask_digest(self) -> str:
        """Hex digest of which elements are active."""
        total = hashlib.sha256()
        for group in self.param_groups:
            for parameter in group["params"]:
                index = self.state[parameter]["index"]
                total.update(str(tuple(parameter.shape)).encode())
                total.update(b"all" if index is None else index.cpu().numpy().tobytes())
        return total.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """As in torch, without the indices (the masks give them again) and with a digest of the masks."""
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


def _active(parameter: Tensor, mask: Tensor | None) -> Tensor | None:
    """Flat positions of the active elements of this rank's shard; None where all are active."""
    local = _local(parameter)
    if mask is None:
        return None
    if local is not parameter and not hasattr(mask, "to_local") and mask.shape == parameter.shape:
        mask = _shard_like(mask.to(local.device), parameter)
    mask = _local(mask)
    if mask.shape != local.shape:
        raise ValueError(f"mask of shape {tuple(mask.shape)} on a parameter of shape {tuple(local.shape)}")
    if bool(mask.all()):
        return None
    index = mask.reshape(-1).nonzero().squeeze(1).to(local.device)
    return index.int() if local.numel() < 2**31 else index


def _side_by_side(
    parameters: list[nn.Parameter], indices: list[Tensor | None]
) -> Iterator[list[tuple[nn.Parameter, Tensor | None]]]:
    """Runs of neighbours of one device and dtype, each of at most a chunk's elements (or of one parameter)."""
    members: list[tuple[nn.Parameter, Tensor | None]] = []
    size = 0
    for parameter, index in zip(parameters, indices, strict=True):
        local, length = _local(parameter), _length(parameter, index)
        room = CHUNK.get(local.device.type, CHUNK["cuda"])
        if members and (_kind(members[0][0]) != _kind(parameter) or size + length > room):
            yield members
            members, size = [], 0
        members.append((parameter, index))
        size += length
    if members:
        yield members


def _kind(parameter: Tensor) -> tuple[torch.device, torch.dtype]:
    return parameter.device, parameter.dtype


def _compute_dtype(local: Tensor) -> torch.dtype:
    return torch.float64 if local.dtype == torch.float64 else torch.float32


def _length(parameter: Tensor, index: Tensor | None) -> int:
    return _local(parameter).numel() if index is None else index.numel()


def _local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, else the tensor itself."""
    shard = getattr(tensor, "to_local", None)
    local: Tensor = shard() if shard is not None else tensor
    return local


def _shard_like(mask: Tensor, parameter: Any) -> Tensor:
    """A whole mask cut as its sharded parameter is: every rank takes its part, without a word to the others."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _shard_groups(parameter: Any) -> tuple[Any, ...]:
    """The process groups over which a DTensor's shards are spread; none for an ordinary or a replicated tensor."""
    if not hasattr(parameter, "to_local"):
        return ()
    mesh = parameter.device_mesh
    return tuple(mesh.get_group(dim) for dim, placed in enumerate(parameter.placements) if placed.is_shard())


def _select(tensor: Tensor, index: Tensor | None) -> Tensor:
    """The active elements, flat."""
    flat = tensor.reshape(-1)
    return flat if index is None else flat.index_select(0, index)


def _gather(tensor: Tensor, index: Tensor | None, out: Tensor) -> None:
    """Copy the active elements into `out`, in `out`'s dtype."""
    if index is None or tensor.dtype != out.dtype:
        out.copy_(_select(tensor, index))
    else:
        torch.index_select(tensor.reshape(-1), 0, index, out=out)


def _scatter(tensor: Tensor, index: Tensor | None, values: Tensor) -> None:
    """Write the active elements back; nothing else is touched."""
    if index is None:
        tensor.view(-1).copy_(values)
    else:
        tensor.view(-1).index_put_((index,), values.to(tensor.dtype))
