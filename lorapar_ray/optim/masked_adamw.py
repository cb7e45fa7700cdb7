"""AdamW that stores and touches active elements only.

Masking the gradient under a stock AdamW freezes nothing: weight decay and stale moments still move a "frozen" element
(method, section 3). Here an inactive element has no moments, is not read and is never written, so it keeps its bits
whatever decay, momentum, clipping or loss scaling do; and the optimiser's memory is the active share of AdamW's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


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
        lora_plus_ratio: learning rate of the B matrices over that of the A matrices (LoRA+, arXiv 2402.12354).
    """
    groups = []
    for letter, rate in (("A", lr), ("B", lr * lora_plus_ratio)):
        keys = [key for key in sorted(parameters) if f".lora_{letter}." in key]
        if keys:
            group = {"params": [parameters[key] for key in keys], "masks": [masks[key] for key in keys]}
            groups.append({**group, "lr": rate, "weight_decay": weight_decay})
    return groups


def trainable_share(masks: Mapping[str, Tensor]) -> float:
    """Active elements over all elements."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) on the active elements of each parameter.

    In float32 every active element takes the same bits as under `torch.optim.AdamW(foreach=False)`: the same
    operations run in the same order on the gathered elements. Parameters of lower precision are stepped through
    float32 master values, which stock AdamW does not keep.

    State per parameter: `index` (flat positions, int32 where they fit; none if all are active), and flat `exp_avg`,
    `exp_avg_sq` and, below float32, `master`, all of the active length.
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

        Raises:
            ValueError: a setting out of range, or masks that do not fit their parameters.
        """
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"need lr, eps, weight_decay >= 0 and betas in [0, 1), got {lr}, {eps}, {weight_decay}, {betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            masks = group.pop("masks", None) or [None] * len(group["params"])
            if len(masks) != len(group["params"]):
                raise ValueError(f"{len(group['params'])} parameters but {len(masks)} masks in one group")
            for parameter, mask in zip(group["params"], masks, strict=True):
                self._prepare(parameter, mask)

    @torch.no_grad()
    def _prepare(self, parameter: Tensor, mask: Tensor | None) -> None:
        local = _local(parameter)
        index = None
        if mask is not None:
            mask = _local(mask)
            if mask.shape != local.shape:
                raise ValueError(f"mask of shape {tuple(mask.shape)} on a parameter of shape {tuple(local.shape)}")
            if not bool(mask.all()):
                index = mask.reshape(-1).nonzero().squeeze(1).to(local.device)
                if local.numel() < 2**31:
                    index = index.int()
        active = local.numel() if index is None else index.numel()
        moments = {name: torch.zeros(active, dtype=torch.float32, device=local.device) for name in _MOMENTS}
        if local.dtype == torch.float64:
            moments = {name: value.double() for name, value in moments.items()}
        state: dict[str, Any] = {"step": 0, "index": index, **moments}
        if local.dtype in (torch.bfloat16, torch.float16):
            state["master"] = _gather(local, index).float()
        self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; parameters without a gradient are skipped, as in AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        local, index = _local(parameter), state["index"]
        state["step"] += 1
        if state["exp_avg"].numel() == 0:
            return
        value = state["master"] if "master" in state else _gather(local, index)
        gradient = _gather(_local(parameter.grad), index).to(value.dtype)
        beta1, beta2 = group["betas"]
        value.mul_(1 - group["lr"] * group["weight_decay"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step_size = group["lr"] / (1 - beta1 ** state["step"])
        root = (1 - beta2 ** state["step"]) ** 0.5
        value.addcdiv_(state["exp_avg"], (state["exp_avg_sq"].sqrt() / root).add_(group["eps"]), value=-step_size)
        if index is None:
            if value.data_ptr() != local.data_ptr():
                local.view(-1).copy_(value)
        else:
            local.view(-1).index_put_((index,), value.to(local.dtype))

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the active gradients so that their joint norm is at most `max_norm`; returns the norm before.

        Inactive gradients, even infinite ones, neither count nor change. Sharded parameters (DTensor) give the norm
        over all shards.
        """
        squares = []
        sharded = False
        for gradient, index, is_sharded in self._active_gradients():
            squares.append(_gather(gradient, index).float().square().sum())
            sharded |= is_sharded
        total = torch.stack(squares).sum() if squares else torch.zeros(())
        if sharded:
            torch.distributed.all_reduce(total)
        norm = total.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if bool(scale < 1):
            for gradient, index, _ in self._active_gradients():
                if index is None:
                    gradient.mul_(scale)
                else:
                    gradient.view(-1).index_put_((index,), (_gather(gradient, index) * scale).to(gradient.dtype))
        return norm

    def _active_gradients(self) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = _local(parameter.grad)
                    yield gradient, self.state[parameter]["index"], gradient is not parameter.grad

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


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, else the tensor itself."""
    shard = getattr(tensor, "to_local", None)
    local: Tensor = shard() if shard is not None else tensor
    return local


def _gather(tensor: Tensor, index: Tensor | None) -> Tensor:
    """The active elements as a flat tensor (a view of the whole where all are active)."""
    flat = tensor.view(-1)
    return flat if index is None else flat.index_select(0, index)
