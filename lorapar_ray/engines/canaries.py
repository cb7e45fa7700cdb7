"""Canary tokens: they verify which policy an engine serves, up to a tolerance for numerics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lorapar_ray.errors import UserError

CANARY_FACTOR = 8.0
"""Tolerance as a multiple of the gap on the base without an adapter: for trained policies the gap can triple."""
MOST_TOLERANCE = 0.5
"""Nats; a larger gap on the base without an adapter is not rounding: learner and engine have different models."""


@dataclass(frozen=True)
class Canary:
    """Tokens whose log-probabilities must agree between the learner and every engine."""

    token_ids: list[int]
    start: int
    logprobs: list[float]
    """The learner's log-probabilities of `token_ids[start:]`."""


def canary_gap(canaries: Sequence[Canary], scored: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference, in nats, between the learner's and an engine's log-probabilities of the canaries."""
    gaps = [
        abs(ours - theirs)
        for canary, engine in zip(canaries, scored, strict=True)
        for ours, theirs in zip(canary.logprobs, engine, strict=True)
    ]
    return fmean(gaps) if gaps else 0.0


def mean_gap(decoded: Sequence[float], afresh: Sequence[float]) -> float:
    """Mean absolute difference, in nats, of log-probabilities of the same tokens: decoded, and computed afresh."""
    return fmean(abs(a - b) for a, b in zip(decoded, afresh, strict=True))


def gaps_between(
    canaries: Sequence[Canary], scored: Sequence[Sequence[float]], cached: Sequence[float]
) -> dict[str, float]:
    """Gaps in nats, by what they are gaps of.

    Args:
        scored: an engine's log-probabilities of the canaries.
        cached: its gaps between decoding after a cached prompt and a computation without the cache.
    """
    return {
        "its log-probabilities of the canary tokens": canary_gap(canaries, scored),
        "the tokens it decodes after a cached prompt": max(cached, default=0.0),
    }


def refusal(gaps: dict[str, float], tolerance: float) -> str:
    """A clause about the first gap beyond `tolerance` (nats); empty if there is none."""
    for what, gap in gaps.items():
        if not gap <= tolerance:
            return f"{what} are {gap:.3f} nats off"
    return ""


def canary_tolerance(base_gap: float, least: float, fix: str) -> float:
    """The canary tolerance, in nats, from the gap due to numerics on the base without an adapter.

    Args:
        fix: what the user can do about another model, for the message.

    Raises:
        UserError: the gap is too large for one model.
    """
    if not base_gap <= MOST_TOLERANCE:
        raise UserError(
            f"without an adapter learner and engine differ by {base_gap:.3f} nats, so they do not have the same model; "
            f"{fix}"
        )
    return min(MOST_TOLERANCE, max(least, CANARY_FACTOR * base_gap))
