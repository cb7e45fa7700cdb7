"""The policy that a run's engines serve: published to all of them, and loaded into new ones.

Only a policy's note passes through here. The engines fetch the policy themselves (see `engines/policy_transport.py`).
Its owner is the learner that made it; if that learner dies, the policy is lost, not the engine: the next learner
publishes another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from lorapar_ray.engines.canaries import Canary
from lorapar_ray.engines.losses import is_lost
from lorapar_ray.engines.policy import PolicyNote
from lorapar_ray.engines.supervisor import EngineSupervisor
from lorapar_ray.grpo.policy_proof import PolicyLost, compare, gaps_of, load


class ServedPolicy:
    """Used in one event loop."""

    def __init__(self, supervisor: EngineSupervisor, tolerance: float, time_limit_s: float) -> None:
        """Store the engines.

        Args:
            tolerance: the largest canary gap, in nats.
            time_limit_s: for loading and verifying a policy.
        """
        self._supervisor, self.tolerance, self._time_limit_s = supervisor, tolerance, time_limit_s
        self._gaps: dict[int, float] = {}
        """Canary gaps by place, in nats."""
        self._current: PolicyNote | None = None
        self._whole: PolicyNote | None = None
        """The whole policy to which the current policy's changes apply."""
        self._newer = asyncio.Event()
        self._canaries: Sequence[Canary] = ()
        self._published = 0

    async def base_gap(self, canaries: Sequence[Canary]) -> float:
        """The largest canary gap before any policy is served, in nats: it is due to numerics alone.

        Args:
            canaries: with the learner's log-probabilities under the base without an adapter.
        """
        await self._supervisor.started()
        slots = await self._supervisor.alive()
        found = await asyncio.gather(*(gaps_of(self._supervisor.engines[slot], canaries) for slot in slots))
        return max(max(gaps.values()) for gaps in found)

    async def load(self, policy: PolicyNote, canaries: Sequence[Canary]) -> None:
        """Serve a policy on every engine. Sampling may begin; what it finds must wait for `prove`.

        Does not wait for engines that are being rebuilt, unless there is no other: they are verified before their first
        request.

        Args:
            canaries: for `prove`.

        Raises:
            PolicyMismatch: an engine loaded another adapter, or does not compute with it.
            PolicyLost: the learner that made it has died.
        """
        await self._supervisor.started()
        self._current, self._canaries = policy, canaries
        if policy.kind == "whole":
            self._whole = policy
        self._published += 1
        self._newer.set()
        self._newer = asyncio.Event()
        await self._on_each(lambda slot, engine: load(slot, engine, policy))

    async def prove(self) -> float:
        """Verify the loaded policy on every engine, by canaries; returns their largest gap, in nats.

        Raises:
            PolicyMismatch: an engine's log-probabilities of the canary tokens are further from the learner's than the
                tolerance.
        """
        assert self._current is not None
        version = self._current.version

        async def verify(slot: int, engine: Any) -> None:
            self._gaps[slot] = await compare(slot, engine, version, self._canaries, self.tolerance)
            self._supervisor.forget_losses(slot)

        await self._on_each(verify)
        return max(self._gaps[slot] for slot in await self._supervisor.alive())

    async def _on_each(self, work: Callable[[int, Any], Coroutine[Any, Any, None]]) -> None:
        """Do this with every engine, by place; one that is lost meanwhile is replaced."""

        async def on(slot: int, engine: Any) -> None:
            try:
                await asyncio.wait_for(work(slot, engine), self._time_limit_s)
            except Exception as error:
                if not is_lost(error):
                    raise
                self._supervisor.replace(slot, engine, error)

        slots = await self._supervisor.alive()
        await asyncio.gather(*(on(slot, self._supervisor.engines[slot]) for slot in slots))

    async def catch_up(self, slot: int, engine: Any) -> None:
        """Load the current policy into a new engine, and the next one if it is published meanwhile."""
        proved = 0
        while proved != self._published:
            policy, whole, newer, canaries = self._current, self._whole, self._newer, self._canaries
            assert policy is not None and whole is not None
            published = self._published
            try:
                earlier = [] if policy is whole else [whole.reference]
                await load(slot, engine, policy, *earlier)
                self._gaps[slot] = await compare(slot, engine, policy.version, canaries, self.tolerance)
            except PolicyLost:
                await newer.wait()  # the restarted learners publish again
            else:
                proved = published
