"""Tokens by which every engine proves which policy it serves, and how far apart two computations of them may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lorapar_ray.errors import UserError

CANARY_FACTOR = 8.0
"""A measured tolerance in gaps on the bare base: policies that were trained further have been seen to triple it."""
MOST_TOLERANCE = 0.5
"""Nats; a gap on the bare base of this size is no numerics: learner and engine have different models."""


@dataclass(frozen=True)
class Canary:
    """Tokens whose log-probabilities the learner and every engine must agree on."""

    token_ids: list[int]
    start: int
    logprobs: list[float]
    """The learner's, of `token_ids[start:]`."""


def canary_gap(canaries: Sequence[Canary], scored: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference, in nats, between the learner's and an engine's log-probabilities of the canaries."""
    gaps = [
        abs(ours - theirs)
        for canary, engine in zip(canaries, scored, strict=True)
        for ours, theirs in zip(canary.logprobs, engine, strict=True)
    ]
    return fmean(gaps) if gaps else 0.0


def canary_tolerance(base_gap: float, least: float) -> float:
    """The canary tolerance of a run, in nats, from the gap that numerics make on the bare base.

    Raises:
        UserError: the gap is too large for one model.
    """
    if not base_gap <= MOST_TOLERANCE:
        raise UserError(
            f"grpo: on the bare base the learner and the engine are {base_gap:.3f} nats apart, so they do not have the "
            "same model; see model.dtype, model.quantization and grpo.rollout_engine, or set grpo.canary_tolerance to "
            "a number"
        )
    return min(MOST_TOLERANCE, max(least, CANARY_FACTOR * base_gap))
