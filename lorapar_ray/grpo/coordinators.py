"""The coordinators of several runs that train together: they share rollout engines, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.canaries import Canary
from lorapar_ray.engines.policy import PolicyNote
from lorapar_ray.grpo.batches import Share
from lorapar_ray.grpo.coordinator import Coordinator
from lorapar_ray.grpo.sampler import new_engine
from lorapar_ray.grpo.shared_engines import SharedEngines


class Coordinators:
    """Async Ray actor. Methods with `arm` are those of that run's `Coordinator`; see `ArmHandle`."""

    def __init__(
        self, plans: Sequence[dict[str, Any]], engine: Callable[[int], Any] | None = None, placement_group: Any = None
    ) -> None:
        """Take each run's plan; the other arguments are those of `Coordinator`."""
        adapters = sum(GrpoConfig.model_validate(plan["settings"]).policies_in_use for plan in plans)
        shared = SharedEngines(engine or partial(new_engine, {**plans[0], "adapters": adapters}, placement_group))
        self._arms = [
            Coordinator({**plan, "arms": len(plans)}, engine=partial(shared.engine, arm))
            for arm, plan in enumerate(plans)
        ]

    async def start(self) -> list[dict[str, Any]]:
        """Start every engine; returns what each reports."""
        first, *_ = await asyncio.gather(*(arm.start() for arm in self._arms))
        return first

    async def resume(self, step: int, stream: dict[str, Any] | None, arm: int) -> None:
        await self._arms[arm].resume(step, stream)

    async def calibrate(self, canaries: list[Canary], least: float, arm: int) -> float:
        return await self._arms[arm].calibrate(canaries, least)

    async def publish(self, policy: PolicyNote, canaries: list[Canary], arm: int) -> dict[str, float]:
        return await self._arms[arm].publish(policy, canaries)

    async def batch(self, step: int, rank: int, world: int, packed: bool, arm: int) -> Share:
        return await self._arms[arm].batch(step, rank, world, packed)

    async def lost(self, step: int, groups: list[int], arm: int) -> None:
        await self._arms[arm].lost(step, groups)

    async def checkpoint(self, step: int, arm: int) -> dict[str, Any]:
        return await self._arms[arm].checkpoint(step)

    async def ping(self, arm: int = 0) -> None:
        """Do nothing; see `asking.answer_from`."""

    async def make_room(self) -> None:
        """See `Coordinator.make_room`."""
        await asyncio.gather(*(arm.make_room() for arm in self._arms))

    async def stop(self) -> None:
        """End reward workers and engines."""
        await asyncio.gather(*(arm.stop() for arm in self._arms))
