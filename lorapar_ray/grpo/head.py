"""The output head in float32, a few tokens at a time: the logits [N, vocabulary] never exist.

A token's log-probability depends on its hidden state h alone, and its gradient is a vector as long as h:
d log p(t) / dh = (W_t − Σ_v p_v W_v) / temperature. The forward pass knows p, so it stores that vector and the backward
pass only scales it. This takes two products with the head, as with stored logits, without recomputation.

In float32, like the engine's head: bfloat16 logits have steps of an eighth.

If the sampler cut the distribution (top-k, top-p, min-p), probabilities are over the kept tokens, and the head computes
only their logits. If the model scales or caps its logits, the head does it (`logit_transform.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.grpo.logit_transform import NO_CHANGE, PROBES, LogitTransform, logit_transform
from lorapar_ray.logprobs import logits_at, token_logprobs

SLICE = {"cpu": 2**25, "cuda": 2**26}
"""Logits that exist at once; they are float32. Each slice reads the whole head twice."""


class TokenScorer:
    """Log-probabilities under one model; on a CPU it stores a float32 copy of a 16-bit head."""

    def __init__(self, model: Any) -> None:
        self._model = model
        head = model.get_output_embeddings()
        frozen = type(head) is nn.Linear and not any(value.requires_grad for value in head.parameters())
        self._head = head if frozen else None  # a trained or wrapped head takes the slow path
        self._transform = logit_transform(model)
        self._known = False
        """Whether the model was seen to do that after its head, and nothing else."""
        self._wide: Tensor | None = None

    def __call__(
        self,
        inputs: Mapping[str, Any],
        at: tuple[Tensor, Tensor],
        tokens_N: Tensor,
        temperature: float = 1.0,
        kept_NK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities with gradient, entropy without) of the tempered distribution, float32, [N].

        Args:
            inputs: of the model: `input_ids` [R, W] and others.
            at: row and column whose output predicts each token, [N] each.
            tokens_N: the tokens.
            kept_NK: the distribution is over these tokens, padded with −1; None: over the whole vocabulary.
        """
        while self._head is not None:
            with self._scoring(at, tokens_N, temperature, kept_NK, inputs["input_ids"].shape) as scores:
                output = self._model(**inputs, use_cache=False).logits
            seen = self._seen(output) if scores and output.shape == scores[0].shape else None
            if seen is None:
                self._head = None  # the model changes its logits after the head, in a way that is not known here
            elif seen == self._transform:
                return _Through.apply(scores[0], output)[0, :, :2].unbind(-1)
            else:
                self._transform = seen  # the scores are of what the config says, so the pass is repeated
        logits_NV = logits_at(at, self._model, inputs)
        if kept_NK is not None:
            chosen_NK = logits_NV.gather(-1, kept_NK.clamp(min=0)).float() / temperature
            return _among(chosen_NK, kept_NK, tokens_N)
        return token_logprobs(logits_NV, tokens_N, temperature=temperature)

    def stores_logits(self, inputs: Mapping[str, Any]) -> bool:
        """Whether logits [N, vocabulary] exist nevertheless, because of the model's head or what follows it.

        Args:
            inputs: any of the model's, for a pass that shows it.
        """
        if self._head is not None and not self._known:
            first = torch.zeros(1, dtype=torch.long, device=inputs["input_ids"].device)
            with torch.no_grad():
                self(inputs, (first, first), first)
        return self._head is None

    def _seen(self, output: Tensor) -> LogitTransform | None:
        """What the model does to its logits: what its config says, or another that explains the first pass; None if
        none is known."""
        if self._known or not output.numel():
            return self._transform
        probed = output[..., 2:].detach()
        candidates = (self._transform, *self._transform.alternatives())
        found = next((each for each in candidates if each.explains(probed)), None)
        self._known = found is not None
        return found

    @contextmanager
    def _scoring(
        self,
        at: tuple[Tensor, Tensor],
        tokens_N: Tensor,
        temperature: float,
        kept_NK: Tensor | None,
        shape: tuple[int, ...],
    ) -> Iterator[list[Tensor]]:
        """Inside this context the head returns [1, N, 2], log-probabilities and entropy, instead of logits; in the
        first pass followed by `PROBES`.

        They go through the model's output, so that hooks on it (FSDP) see the backward pass begin.
        """
        head = self._head
        assert head is not None
        scores: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            if hidden.shape[:2] != shape:
                return nn.functional.linear(hidden, head.weight, head.bias)
            own: dict[str, Any] = {"bias": head.bias, "transform": replace(self._transform, temperature=temperature)}
            if kept_NK is None:
                found = head_logprobs(hidden[at], head.weight, tokens_N, wide_VD=self._wide_weight(), **own)
            else:
                found = kept_logprobs(hidden[at], head.weight, tokens_N, kept_NK, **own)
            probes = [] if self._known else [torch.full_like(found[1], each) for each in PROBES]
            scores.append(torch.stack((*found, *probes), -1)[None])
            return scores[0]

        head.forward = forward  # type: ignore[method-assign]
        try:
            yield scores
        finally:
            del head.forward

    def _wide_weight(self) -> Tensor | None:
        assert self._head is not None
        weight = self._head.weight
        if weight.device.type != "cpu" or weight.dtype == torch.float32:
            return None
        if self._wide is None:
            self._wide = weight.detach().float()
        return self._wide


def head_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_N: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = NO_CHANGE,
    wide_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropy without gradient) of `tokens_N`, float32, [N]; the head gets no gradient.

    Args:
        hidden_ND: the head's input, in the head's dtype.
        weight_VD: the head's weight.
        bias: the head's, [V].
        transform: from the head's output to the distribution.
        wide_VD: the weight in float32, for a CPU, which cannot multiply 16-bit numbers into float32 ones.
    """
    wide_VD = weight_VD if wide_VD is None else wide_VD
    logprobs, entropy = _HeadLogprobs.apply(hidden_ND, weight_VD, wide_VD, tokens_N, bias, transform)
    return logprobs, entropy


def kept_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_N: Tensor,
    kept_NK: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = NO_CHANGE,
) -> tuple[Tensor, Tensor]:
    """As `head_logprobs`, for the distribution over only the K tokens `kept_NK` (−1: none): π(t) / Σ_kept π(v)."""
    logprobs, entropy = _KeptLogprobs.apply(hidden_ND, weight_VD, tokens_N, kept_NK, bias, transform)
    return logprobs, entropy


def _among(chosen_NK: Tensor, kept_NK: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropy without gradient) of tokens among kept ones with these tempered logits."""
    scored_NK = chosen_NK.masked_fill(kept_NK < 0, -torch.inf).log_softmax(-1)
    own_NK = kept_NK == tokens_N[:, None]
    known_NK = scored_NK.detach().masked_fill(kept_NK < 0, 0.0)
    entropy_N = -(known_NK * scored_NK.detach().exp()).sum(-1)
    return scored_NK.masked_fill(~own_NK, 0.0).sum(-1), entropy_N


class _WithSlope(torch.autograd.Function):
    """Stores a log-probability's gradient, a vector as long as the hidden state, instead of rows of the head for every
    token. Of the six inputs only the first, the hidden states, gets a gradient."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope_ND,) = ctx.saved_tensors
        return (slope_ND * gradients[0][:, None]).to(slope_ND.dtype), None, None, None, None, None


class _Through(torch.autograd.Function):
    """The scores; their gradient also comes, as zeros, through the output that the model made of them."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, output: Tensor) -> Tensor:
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.zeros_like(gradients[0])


def _keep_slope(ctx: Any, entropy: Tensor, slope_ND: Tensor | None) -> None:
    ctx.mark_non_differentiable(entropy)
    if slope_ND is not None:
        ctx.save_for_backward(slope_ND)


class _KeptLogprobs(_WithSlope):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        tokens_N: Tensor,
        kept_NK: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        (count, kept), width = kept_NK.shape, hidden_ND.shape[1]
        logprobs, entropy = (torch.empty(count, device=hidden_ND.device) for _ in range(2))
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        rows = max(1, SLICE.get(hidden_ND.device.type, SLICE["cuda"]) // (kept * width))
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            ids_nK = kept_NK[part].clamp(min=0)
            weight_nKD = weight_VD[ids_nK].float()
            chosen_nK = (weight_nKD @ hidden_ND[part].float()[..., None])[..., 0]
            if bias is not None:
                chosen_nK = chosen_nK + bias[ids_nK]
            chosen_nK = transform.apply_(chosen_nK)
            logprobs[part], entropy[part] = _among(chosen_nK, kept_NK[part], tokens_N[part])
            if slope_ND is not None:
                p_nK = chosen_nK.masked_fill(kept_NK[part] < 0, -torch.inf).softmax(-1)
                change_nK = (kept_NK[part] == tokens_N[part, None]).float() - p_nK
                if (curve_nK := transform.relative_slope_(chosen_nK)) is not None:
                    change_nK *= curve_nK
                slope_ND[part] = ((change_nK[:, None] @ weight_nKD)[:, 0] * transform.slope).to(slope_ND.dtype)
        _keep_slope(ctx, entropy, slope_ND)
        return logprobs, entropy


class _HeadLogprobs(_WithSlope):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        wide_VD: Tensor,
        tokens_N: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        count, vocabulary = len(tokens_N), len(weight_VD)
        logprobs, entropy = (torch.empty(count, device=hidden_ND.device) for _ in range(2))
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        rows = max(1, min(count, SLICE.get(hidden_ND.device.type, SLICE["cuda"]) // vocabulary))
        probabilities = torch.empty(rows, vocabulary, device=hidden_ND.device)  # fresh pages would be slow on a CPU
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            tokens = tokens_N[part, None]
            logits = _product(hidden_ND[part], wide_VD)
            if bias is not None:
                logits += bias
            logits = transform.apply_(logits)
            largest = logits.amax(-1, keepdim=True)
            p = torch.sub(logits, largest, out=probabilities[: len(logits)]).exp_()
            mass = p.sum(-1, keepdim=True)
            total = largest + mass.log()
            p /= mass
            logprobs[part] = (logits.gather(-1, tokens) - total)[:, 0]
            entropy[part] = total[:, 0] - torch.linalg.vecdot(logits, p)
            if slope_ND is not None:
                onehot = torch.ones_like(tokens, dtype=p.dtype)
                change = p.neg_().scatter_add_(-1, tokens, onehot)
                if (curve := transform.relative_slope_(logits)) is not None:
                    change *= curve
                slope_ND[part] = (change.to(weight_VD.dtype) @ weight_VD) * transform.slope
        _keep_slope(ctx, entropy, slope_ND)
        return logprobs, entropy


def _product(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden · weightᵀ in float32: products of 16-bit numbers are exact there, so a GPU needs no float32 copy."""
    if weight_VD.dtype == torch.float32:
        return hidden_ND.float() @ weight_VD.T
    return torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
