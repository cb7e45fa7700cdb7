"""Policy-gradient losses as pure functions of log-probabilities.

Suffixes name the dimensions: B sequences, T completion tokens (padded, see the mask). All losses are to be minimised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"]


@dataclass(frozen=True)
class LossOutput:
    """The loss with its graph, and figures to log."""

    loss: Tensor
    figures: dict[str, Tensor]
    """Scalars that the device may still be computing: reading one waits for it."""


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor | None,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    loss_type: LossType = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_completion_length: int | None = None,
    num_tokens_global: int | None = None,
    ref_logprobs_BT: Tensor | None = None,
    kl_beta: float = 0.0,
    sampling_logprobs_BT: Tensor | None = None,
    tis_cap: float | None = None,
    sequence_mask_bounds: tuple[float, float] | None = None,
    entropy_BT: Tensor | None = None,
) -> LossOutput:
    """Clipped surrogate loss of GRPO and its variants.

    Args:
        logprobs_BT: of the sampled tokens under the policy being trained.
        old_logprobs_BT: under the old policy of the ratio (detached); None: that is the sampler.
        advantages_B: one per sequence.
        mask_BT: 1 for completion tokens that count, 0 for padding and masked completions.
        loss_type: how tokens are weighted. `grpo`: mean over each sequence, then over sequences (arXiv 2402.03300).
            `dapo`: mean over all tokens of the step, `num_tokens_global` (arXiv 2503.14476). `bnpo`: mean over the
            tokens given here; those of dropped sequences count, as in TRL. `dr_grpo`: sum over
            B · max_completion_length (arXiv 2503.20783). `gspo`: sequence ratio (arXiv 2507.18071), otherwise as
            `grpo`. `cispo`: the ratio is capped and detached, so that clipped tokens keep their gradient (arXiv
            2506.13585), otherwise as `dapo`.
        clip_low: the ratio is clipped to [1 − clip_low, 1 + clip_high].
        clip_high: `cispo` caps the ratio at `clip_high` itself.
        ref_logprobs_BT: of the tokens under the reference of the k3 estimate of KL(policy ‖ reference).
        kl_beta: weight of that estimate.
        sampling_logprobs_BT: under the sampler, for truncated importance sampling: each token is weighted by
            min(exp(old − sampling), tis_cap), because the sampler's numerics differ from the learner's.
        tis_cap: the largest such weight; unused if the old policy is the sampler, whose ratio is already in the loss.
        sequence_mask_bounds: drop sequences whose mean ratio of the learner to the sampler is outside these bounds. The
            learner is the old policy or, if that is the sampler, the policy being trained.

    Raises:
        ValueError: `dr_grpo` without `max_completion_length`; or neither an old policy nor a sampler.
    """
    if old_logprobs_BT is not None:
        old_BT = learner_BT = old_logprobs_BT
    elif sampling_logprobs_BT is not None:
        old_BT, learner_BT, tis_cap = sampling_logprobs_BT, logprobs_BT, None
    else:
        raise ValueError("the ratio needs old_logprobs_BT or sampling_logprobs_BT")
    kept_BT = mask_BT
    log_ratio_BT = logprobs_BT - old_BT
    if loss_type == "gspo":
        mean_B = _per_sequence(log_ratio_BT, mask_BT)
        log_ratio_BT = mean_B[:, None].expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.exp()
    advantages_B1 = advantages_B[:, None]
    if loss_type == "cispo":
        token_loss_BT = -ratio_BT.clamp(max=clip_high).detach() * advantages_B1 * logprobs_BT
    else:
        clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
        token_loss_BT = -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    metrics = _clip_metrics(ratio_BT, advantages_B1, mask_BT, loss_type, clip_low, clip_high)
    if sampling_logprobs_BT is not None:
        token_loss_BT, kept_BT = _correct_sampler(
            token_loss_BT, mask_BT, learner_BT, sampling_logprobs_BT, tis_cap, sequence_mask_bounds, metrics
        )
    if kl_beta > 0 and ref_logprobs_BT is not None:
        gap_BT = ref_logprobs_BT - logprobs_BT
        kl_BT = gap_BT.exp() - gap_BT - 1
        token_loss_BT = token_loss_BT + kl_beta * kl_BT
        metrics["kl"] = _mean(kl_BT, mask_BT)
    if entropy_BT is not None:
        metrics["entropy"] = _mean(entropy_BT, mask_BT)
    loss = _reduce(token_loss_BT * kept_BT, mask_BT, loss_type, max_completion_length, num_tokens_global)
    return LossOutput(loss, metrics)


def part_weight(loss_type: LossType, of_sequences: float, of_tokens: float) -> float:
    """The weight of a part's loss in an update's loss, which is the sum over its parts.

    `dapo` and `cispo` are already normalised by the update's tokens; the others are means over the given part. So the
    sum does not depend on how the samples were split into parts.

    Args:
        of_sequences: the part's share of the update's sequences.
        of_tokens: its share of the update's completion tokens.
    """
    if loss_type in ("dapo", "cispo"):
        return 1.0
    return of_tokens if loss_type == "bnpo" else of_sequences


def _reduce(
    loss_BT: Tensor, mask_BT: Tensor, loss_type: LossType, max_length: int | None, tokens_global: int | None
) -> Tensor:
    if loss_type in ("grpo", "gspo"):
        return _per_sequence(loss_BT, mask_BT).mean()
    total = (loss_BT * mask_BT).sum()
    if loss_type == "bnpo":
        return total / mask_BT.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        if max_length is None:
            raise ValueError("dr_grpo needs max_completion_length")
        return total / (len(loss_BT) * max_length)
    return total / (mask_BT.sum().clamp(min=1.0) if tokens_global is None else max(1, tokens_global))


def _correct_sampler(
    loss_BT: Tensor,
    mask_BT: Tensor,
    learner_BT: Tensor,
    sampling_BT: Tensor,
    cap: float | None,
    bounds: tuple[float, float] | None,
    metrics: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The weighted loss, and the mask of the kept sequences, from the learner's ratio to the sampler."""
    gap_BT = (learner_BT - sampling_BT).detach() * mask_BT
    metrics |= _sampler_figures(gap_BT, mask_BT)
    if cap is not None:
        loss_BT = loss_BT * gap_BT.exp().clamp(max=cap)
    if bounds is not None:
        sequence_B = _per_sequence(gap_BT, mask_BT).exp()
        inside_B = (sequence_B >= bounds[0]) & (sequence_B <= bounds[1])
        metrics["sequence_masked_share"] = 1 - inside_B.float().mean()
        mask_BT = mask_BT * inside_B[:, None]
    return loss_BT, mask_BT


def _sampler_figures(gap_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """How far the learner's log-probabilities are from the sampler's (`gap_BT`, 0 where masked): the on-policy gap.

    `logprob_gap` is the mean absolute difference in nats, `ratio_...` are of exp(gap), over the tokens that count.
    """
    ratio_BT, real_BT = gap_BT.exp(), mask_BT > 0
    return {
        "logprob_gap": _mean(gap_BT.abs(), mask_BT),
        "ratio_mean": _mean(ratio_BT, mask_BT),
        "ratio_max": ratio_BT.masked_fill(~real_BT, 0.0).max(),
        "ratio_min": ratio_BT.masked_fill(~real_BT, torch.inf).min(),
    }


def _clip_metrics(
    ratio_BT: Tensor, advantages_B1: Tensor, mask_BT: Tensor, loss_type: LossType, low: float, high: float
) -> dict[str, Tensor]:
    ratio_BT = ratio_BT.detach()
    if loss_type == "cispo":
        return {
            "clip_low_share": torch.zeros((), device=ratio_BT.device, dtype=ratio_BT.dtype),
            "clip_high_share": _mean(((ratio_BT > high) & (advantages_B1 > 0)).float(), mask_BT),
        }
    return {
        "clip_low_share": _mean(((ratio_BT < 1 - low) & (advantages_B1 < 0)).float(), mask_BT),
        "clip_high_share": _mean(((ratio_BT > 1 + high) & (advantages_B1 > 0)).float(), mask_BT),
    }


def _per_sequence(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return (value_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1.0)


def _mean(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return (value_BT.detach() * mask_BT).sum() / mask_BT.sum().clamp(min=1.0)
