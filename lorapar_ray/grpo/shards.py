"""Several samplers, each an actor with its part of the engines, since one process cannot handle hundreds of engines.

The coordinator sends each shard its part of a step's prompts in one call, and gets rewards, lengths and references
back. So its own work no longer grows with the number of requests to engines and reward workers.

A shard that dies ends the coordinator: both start again, and the learners resume from their checkpoint.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from functools import reduce
from math import ceil
from operator import add
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.canaries import Canary
from lorapar_ray.engines.policy import PolicyNote
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.rewards.actor import RewardActor
from lorapar_ray.grpo.sampler import Counts, Sampler
from lorapar_ray.waiting import awaited
from lorapar_ray.workers import actor_ended, beside_the_driver

ENGINES_EACH = 64
"""Engines per shard with `rollout_shards: auto`. A group takes 4 ms of a core (`jobs/benchmarks/rollout_scale.py`), so
one process handles at most 250 groups per second; this many engines of 14,000 tokens/s each sample 27 in that time, and
keep it busy for 11 %."""


class Shards:
    """The same methods as `Sampler`, over several of them."""

    def __init__(
        self,
        plan: dict[str, Any],
        count: int,
        engine: Callable[[int], Any] | None = None,
        placement_group: Any = None,
        reward_worker: type[Any] = RewardActor,
    ) -> None:
        """Start `count` actors on this machine; the other arguments are those of `Coordinator`."""
        import ray

        actor = ray.remote(Sampler).options(**beside_the_driver(), max_concurrency=1000)
        self._actors = [actor.remote(part, engine, placement_group, reward_worker) for part in parts_of(plan, count)]
        self._next = 0
        """The shard that gets the next prompt: a call with few prompts goes on where the last one stopped."""

    async def start(self) -> list[dict[str, Any]]:
        return [each for found in await self._all("start") for each in found]

    async def begin_to_start(self) -> None:
        await self._all("begin_to_start")

    async def grow(self) -> None:
        await self._all("grow")

    async def make_room(self) -> None:
        await self._all("make_room")

    async def base_gap(self, canaries: Sequence[Canary]) -> float:
        return max(await self._all("base_gap", canaries))

    async def tolerate(self, tolerance: float) -> None:
        await self._all("tolerate", tolerance)

    async def load(self, policy: PolicyNote, canaries: Sequence[Canary]) -> None:
        await self._all("load", policy, canaries)

    async def prove(self) -> float:
        return max(await self._all("prove"))

    async def groups(self, indices: Sequence[int], step: int, attempt: int) -> list[Group]:
        parts = dealt(len(indices), len(self._actors), self._next)
        self._next = (self._next + len(indices)) % len(self._actors)
        asked = [(actor, part) for actor, part in zip(self._actors, parts, strict=True) if part]
        calls = [actor.groups.remote([indices[at] for at in part], step, attempt) for actor, part in asked]
        found: dict[int, Group] = {}
        for (_, part), groups in zip(asked, await _answers(calls), strict=True):
            found |= zip(part, groups, strict=True)
        return [found[at] for at in range(len(indices))]

    async def counts(self) -> Counts:
        return reduce(add, await self._all("counts"))

    async def stop(self) -> None:
        import ray

        await self._all("stop")
        for actor in self._actors:
            ray.kill(actor)

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return await _answers([getattr(actor, method).remote(*arguments) for actor in self._actors])


def shard_count(settings: GrpoConfig) -> int:
    """How many samplers a run has; 1: the coordinator's own."""
    if settings.rollout_shards != "auto":
        return settings.rollout_shards
    return min(_wanted(settings), settings.most_shards)


def too_few_shards(settings: GrpoConfig) -> str | None:
    """What limits the number of samplers, if `auto` gives fewer than so many engines need."""
    count, wanted = shard_count(settings), _wanted(settings)
    if settings.rollout_shards != "auto" or count == wanted:
        return None
    fields = ["rollout_actors", "reward_workers", *(["environment_workers"] if settings.environment else [])]
    few = [f"grpo.{field} ({getattr(settings, field)})" for field in fields if getattr(settings, field) < wanted]
    return (
        f"the engines need {wanted} processes that send requests and get {count}; raise {' and '.join(few)} to {wanted}"
    )


def _wanted(settings: GrpoConfig) -> int:
    return ceil((settings.rollout_actors + settings.extra_rollout_actors) / ENGINES_EACH)


def parts_of(plan: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A plan for each shard, with its part of the engines and workers."""
    settings = GrpoConfig.model_validate(plan["settings"])
    names = ("rollout_actors", "extra_rollout_actors", "reward_workers", "environment_workers")

    def part(shard: int) -> dict[str, Any]:
        engines, extra, rewards, environments = (len(range(shard, getattr(settings, name), count)) for name in names)
        return {
            "rollout_shards": 1,
            "rollout_actors": engines,
            "max_rollout_actors": engines + extra,
            "reward_workers": rewards,
            "environment_workers": max(1, environments),  # unused without an environment
        }

    return [{**plan, "settings": {**plan["settings"], **part(shard)}} for shard in range(count)]


def dealt(prompts: int, shards: int, first: int) -> list[range]:
    """The places in a list of prompts that each shard gets, dealt round-robin from shard `first` on."""
    return [range((shard - first) % shards, prompts, shards) for shard in range(shards)]


async def _answers(calls: Sequence[Any]) -> list[Any]:
    """The shards' results. If this is cancelled, the calls are cancelled too, and have ended when it returns."""
    import ray

    tasks = [asyncio.ensure_future(awaited(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    except asyncio.CancelledError:
        for call in calls:
            ray.cancel(call)
        await asyncio.gather(*(awaited(call) for call in calls), return_exceptions=True)
        raise
    except ray.exceptions.RayError as error:
        if actor_ended(error) and not isinstance(error, ray.exceptions.RayTaskError):  # not an error that it reports
            os._exit(1)
        raise
