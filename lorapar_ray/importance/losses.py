"""Each example's mean loss over its response, without the logits of a whole batch in float32.

Only positions that predict a response token reach the output head, a slice of them at a time. The gradient of
cross-entropy by the head's input is (softmax − one-hot) W, so a slice's logits are needed only once: the forward pass
computes loss and gradient from them and frees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorapar_ray.importance.batching import Layout
from lorapar_ray.logprobs import logits_at, token_logprobs

SLICE = {"cpu": 2**23, "cuda": 2**26}
"""Logits computed at once, by device."""

_ends_with_its_head: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def losses_of(model: Any, inputs: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Mean cross-entropy over each example's labelled tokens, float32, [examples].

    Args:
        inputs: the model's keyword arguments, on its device, without labels. Packed rows are computed, and later
            differentiated, within `capture.attention_of`.
    """
    losses = None
    if _ends_with_its_head.get(model, True):
        losses = _through_the_head(model, inputs, layout)
    if losses is None:  # something follows the head (a soft cap, a scale), or it is no plain linear layer
        _ends_with_its_head[model] = False
        rows, columns = layout.predicting // layout.shape[1], layout.predicting % layout.shape[1]
        logits = logits_at((rows, columns), model, inputs)
        losses = -token_logprobs(logits, layout.targets)[0]
    zeros = torch.zeros(len(layout.lengths), device=losses.device)
    return zeros.index_add(0, layout.owner, losses * layout.weights)


def _through_the_head(model: Any, inputs: Mapping[str, Tensor], layout: Layout) -> Tensor | None:
    """Losses [N] computed inside the call of the head; None if this model does not allow it."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    seen: dict[str, Tensor] = {}

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        hidden = arguments[0]
        if tuple(hidden.shape[:2]) != layout.shape:
            return None
        chosen = hidden.flatten(0, 1).index_select(0, layout.predicting)
        seen["losses"] = _HeadLosses.apply(chosen, module.weight, module.bias, layout.targets)
        return (chosen[None, :1].detach(),)

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen["logits"] = output

    handles = [head.register_forward_pre_hook(take), head.register_forward_hook(keep)]
    try:
        output = model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if "losses" not in seen or output is not seen["logits"]:
        return None
    _ends_with_its_head[model] = True
    return seen["losses"]


class _HeadLosses(torch.autograd.Function):
    """Cross-entropy [N] of a linear head over hidden states [N, D]; loss and gradient of a slice are computed
    together."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        count, vocabulary = len(hidden), len(weight)
        losses = torch.empty(count, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if wanted else None
        rows = max(1, min(count, SLICE.get(hidden.device.type, SLICE["cuda"]) // vocabulary))
        scratch = torch.empty(rows, vocabulary, device=hidden.device)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            logits = functional.linear(hidden[part], weight, bias)
            scaled = scratch[: len(logits)].copy_(logits)
            target = targets[part, None]
            own = scaled.gather(-1, target)[:, 0]
            largest = scaled.amax(-1)
            mass = scaled.sub_(largest[:, None]).exp_().sum(-1)
            losses[part] = largest + mass.log() - own
            if slope is not None:
                scaled.div_(mass[:, None]).scatter_add_(-1, target, scaled.new_full((1, 1), -1.0).expand_as(target))
                torch.mm(logits.copy_(scaled), weight, out=slope[part])
        if slope is not None:
            ctx.save_for_backward(slope)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * gradient[:, None]).to(slope.dtype), None, None, None
