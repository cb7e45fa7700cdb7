"""Verifies that an engine serves the policy it was sent: by a digest, canary tokens, and decoding after a cached
prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from lorapar_ray.engines.canaries import Canary, gaps_between, refusal
from lorapar_ray.engines.losses import fetch_failed
from lorapar_ray.engines.mismatch import PolicyMismatch
from lorapar_ray.engines.policy import PolicyNote
from lorapar_ray.waiting import awaited


class PolicyLost(RuntimeError):
    """A policy can no longer be fetched, since the learner that made it has died."""


async def load(slot: int, engine: Any, policy: PolicyNote, *whole: Any) -> None:
    """Load the policy into an engine; its digest proves that the engine got it.

    Args:
        slot: its place, for messages.
        whole: a reference to the whole policy to which the changes apply, for an engine that does not have it.

    Raises:
        PolicyMismatch: it loaded another adapter, or does not compute with it.
        PolicyLost: the learner that made the policy has died.
    """
    try:
        loaded = await engine.load_policy.remote(policy.reference, *whole)
    except Exception as error:
        if fetch_failed(error):
            raise PolicyLost(
                f"policy {policy.version} cannot be fetched: the learner that made it has died, or the transfer failed"
            ) from error
        if isinstance(error, PolicyMismatch):
            why = str(getattr(error, "cause", error))  # Ray's exception adds the actor's traceback
            raise PolicyMismatch(f"rollout engine {slot} does not serve policy {policy.version}: {why}") from error
        raise
    if loaded != policy.digest:
        raise PolicyMismatch(
            f"rollout engine {slot} loaded {loaded[:9]} as policy {policy.version}, not {policy.digest[:9]}"
        )


async def compare(slot: int, engine: Any, version: int, canaries: Sequence[Canary], tolerance: float) -> float:
    """Compare what an engine computes with what the learner did; returns the canary gap, in nats.

    Args:
        tolerance: the largest gap, in nats.

    Raises:
        PolicyMismatch: the gap exceeds it.
    """
    gaps = await gaps_of(engine, canaries)
    if why := refusal(gaps, tolerance):
        raise PolicyMismatch(
            f"rollout engine {slot} does not serve policy {version}: {why} (grpo.canary_tolerance {tolerance:.3g})"
        )
    return max(gaps.values())


async def gaps_of(engine: Any, canaries: Sequence[Canary]) -> dict[str, float]:
    """Gaps in nats, by name: an engine's canaries against the learner's, and its decoding against its own prefill."""
    asked = [engine.score.remote(canary.token_ids, canary.start) for canary in canaries]
    asked += [engine.cache_gap.remote(canary.token_ids) for canary in canaries[:1]]  # one is enough: there is one cache
    answers = await asyncio.gather(*map(awaited, asked))
    return gaps_between(canaries, answers[: len(canaries)], answers[len(canaries) :])
