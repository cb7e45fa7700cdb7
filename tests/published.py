"""A policy loaded and proved at once; stage 2 samples in between."""

from collections.abc import Sequence

from lorapar_ray.engines.canaries import Canary
from lorapar_ray.engines.policy import PolicyNote
from lorapar_ray.grpo.served_policy import ServedPolicy


async def published(served: ServedPolicy, policy: PolicyNote, canaries: Sequence[Canary]) -> float:
    """The largest canary gap, in nats."""
    await served.load(policy, canaries)
    return await served.prove()
