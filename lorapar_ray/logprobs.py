"""Log-probabilities of chosen tokens: the output head at the positions that need it, and no float32 copy of its logits.

With a large vocabulary logits take most of a small model's time and most of any model's memory. No logits are computed
for prompt positions; the others stay in the model's dtype, and only a slice at a time is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SLICE = {"cpu": 2**22, "cuda": 2**26}
"""Logits in float32 at once: as many as fit into a CPU's cache; on a GPU more, for few kernels."""

Positions = Tensor | tuple[Tensor, Tensor]
"""A mask [B, T], or row and column of each position, possibly repeated."""


def logits_at(positions: Positions, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits [N, vocabulary] of a causal language model at N positions of `inputs` (`input_ids` [B, T] and others).

    The model's changes of its logits (soft caps, scales) are included.
    """
    with head_sees(positions, model, inputs["input_ids"].shape) as selected:
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.squeeze(0) if selected() else logits[positions]


@contextmanager
def head_sees(positions: Positions, model: Any, shape: tuple[int, ...]) -> Iterator[Callable[[], bool]]:
    """Inside this context `model`'s output head gets the hidden states of `positions`, as one row, instead of all of
    `shape`.

    Yields a function that returns whether this has happened: it does not for a model without a separate head.
    """
    done = False

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal done
        hidden = arguments[0]
        if hidden.shape[:2] != shape:
            return None
        done = True
        return (hidden[positions][None],)

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        yield lambda: done
    finally:
        if handle is not None:
            handle.remove()


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropy without gradient) of the tempered distribution, both float32, in `tokens`' shape.

    Args:
        logits: [..., vocabulary] in any floating dtype; gradients come in the same.
        tokens: [...].
    """
    logprobs, entropy = _TokenLogprobs.apply(logits.flatten(0, -2), tokens.flatten(), temperature)
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


class _TokenLogprobs(torch.autograd.Function):
    """Stores the logits in their own dtype and their log-normalisers; autograd would store them in float32."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropy, total = (torch.empty(len(tokens_N), device=logits_NV.device) for _ in range(3))
        weights = None
        for part, scaled in _tempered_slices(logits_NV, temperature):
            weights = torch.empty_like(scaled) if weights is None else weights[: len(scaled)]
            largest = scaled.amax(-1)
            mass = torch.sub(scaled, largest[:, None], out=weights).exp_().sum(-1)
            total[part] = largest + mass.log()
            logprobs[part] = scaled.gather(-1, tokens_N[part, None])[:, 0] - total[part]
            entropy[part] = total[part] - scaled.mul_(weights).sum(-1) / mass
        ctx.save_for_backward(logits_NV, tokens_N, total)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, tokens_N, total = ctx.saved_tensors
        gradient_N = gradients[0] / ctx.temperature
        result = torch.empty_like(logits_NV)
        for part, scaled in _tempered_slices(logits_NV, ctx.temperature):
            own = gradient_N[part, None]
            slope = scaled.sub_(total[part, None]).exp_().mul_(-own)
            result[part] = slope.scatter_add_(-1, tokens_N[part, None], own)
        return result, None, None


def _tempered_slices(logits_NV: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows in float32 over the temperature, all in the same memory: a CPU's fresh pages are slow."""
    count, vocabulary = logits_NV.shape
    rows = max(1, min(count, SLICE.get(logits_NV.device.type, SLICE["cuda"]) // vocabulary))
    scratch = torch.empty(rows, vocabulary, device=logits_NV.device)
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        scaled = scratch[: part.stop - start].copy_(logits_NV[part])
        yield part, scaled if temperature == 1.0 else scaled.div_(temperature)
