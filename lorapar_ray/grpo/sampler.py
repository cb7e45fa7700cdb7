"""Rollout engines with their reward and environment workers: one place that samples groups and serves policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from math import ceil
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.actor import EngineActor, start_engine
from lorapar_ray.engines.canaries import MOST_TOLERANCE, Canary
from lorapar_ray.engines.policy import PolicyNote
from lorapar_ray.gpus import sync_of
from lorapar_ray.grpo.engine_pool import EnginePool
from lorapar_ray.grpo.environments.actor import EnvironmentWorkers
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.rewards.actor import RewardActor, RewardWorkers
from lorapar_ray.grpo.rollouts import Rollouts
from lorapar_ray.models import resolve_model

FILLINGS = 3
"""In-flight cap: sequences per engine, as a multiple of its batch. A group ends with its longest sequence, so most
groups in flight have few running sequences left; queued groups go to the engine that is free first."""


@dataclass(frozen=True)
class Counts:
    """A sampler's counts since its start."""

    busy_seconds: float = 0.0
    """Seconds with a request in flight, summed over the engines."""
    working: int = 0
    """Engines that are available now."""
    replaced: int = 0
    """Engines replaced."""
    lost: int = 0
    """Groups that were lost with their node and sampled again."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(own + its for own, its in zip(astuple(self), astuple(other), strict=True)))


class Sampler:
    """Used in one event loop: the coordinator's, or that of an actor (see `Shards`). Its processes end with it."""

    def __init__(
        self,
        plan: dict[str, Any],
        engine: Callable[[int], Any] | None = None,
        placement_group: Any = None,
        reward_worker: type[Any] = RewardActor,
    ) -> None:
        """Start the workers; the arguments are those of `Coordinator`."""
        from lorapar_ray.datasets.chat import load_encoder_alone

        settings = GrpoConfig.model_validate(plan["settings"])
        asked = settings.canary_tolerance
        self._pool = EnginePool(
            engine or partial(new_engine, plan, placement_group),
            settings.rollout_actors,
            extra=settings.extra_rollout_actors,
            at_once=groups_at_once(settings, plan.get("arms", 1)),
            tolerance=MOST_TOLERANCE if asked == "auto" else asked,
            time_limit_s=settings.rollout_time_limit_s,
        )
        self._rewards = RewardWorkers(plan, reward_worker)
        self._environments = EnvironmentWorkers(plan) if settings.environment is not None else None
        encoder = load_encoder_alone(resolve_model(plan["model"]), None, plan["trust_remote_code"])
        self._rollouts = Rollouts(settings, plan, encoder.end_ids, self._pool, self._rewards, self._environments)

    async def start(self) -> list[dict[str, Any]]:
        """Start every engine; returns what each reports."""
        return await self._pool.start()

    async def begin_to_start(self) -> None:
        """Start every engine, unless that has begun."""
        self._pool.begin_to_start()

    async def grow(self) -> None:
        """See `EngineSupervisor.grow`."""
        self._pool.supervisor.grow()

    async def make_room(self) -> None:
        """See `EngineSupervisor.make_room`."""
        await self._pool.supervisor.make_room()

    async def base_gap(self, canaries: Sequence[Canary]) -> float:
        """See `ServedPolicy.base_gap`."""
        return await self._pool.policy.base_gap(canaries)

    async def tolerate(self, tolerance: float) -> None:
        """Set the largest canary gap, in nats."""
        self._pool.policy.tolerance = tolerance

    async def load(self, policy: PolicyNote, canaries: Sequence[Canary]) -> None:
        """See `ServedPolicy.load`."""
        await self._pool.policy.load(policy, canaries)

    async def prove(self) -> float:
        """See `ServedPolicy.prove`."""
        return await self._pool.policy.prove()

    async def groups(self, indices: Sequence[int], step: int, attempt: int) -> list[Group]:
        """See `Rollouts.groups`."""
        return await self._rollouts.groups(indices, step, attempt)

    async def counts(self) -> Counts:
        """The counts so far."""
        supervisor = self._pool.supervisor
        working, replaced = len(supervisor.working()), supervisor.replaced
        return Counts(self._pool.busy_seconds(), working, replaced, self._rollouts.lost)

    async def stop(self) -> None:
        """End reward workers, environments and engines."""
        self._rewards.stop()
        if self._environments is not None:
            self._environments.stop()
        await self._pool.stop()


def new_engine(plan: dict[str, Any], placement_group: Any, slot: int, actor: type[EngineActor] = EngineActor) -> Any:
    """Create a run's rollout engine for place `slot`, an `actor`; returns its handle."""
    settings = GrpoConfig.model_validate(plan["settings"])
    engine = settings.rollout_engine
    if settings.top_k:  # the largest number of log-probabilities per request
        engine = engine.model_copy(update={"extra": {"max_logprobs": settings.top_k, **engine.extra}})
    return start_engine(
        plan["model"],
        engine,
        settings.rollout_resources,
        seed=plan["seed"],
        where="grpo.rollout_engine",
        trust_remote_code=plan["trust_remote_code"],
        sync=sync_of(settings),
        max_lora_rank=plan["lora_rank"],
        adapters=plan.get("adapters", settings.policies_in_use),
        placement_group=placement_group if slot < settings.rollout_actors else None,  # only those have a bundle there
        actor=actor,
    )


def groups_at_once(settings: GrpoConfig, arms: int = 1) -> int:
    """In-flight cap: one run's groups per engine, of which `arms` runs have an equal part."""
    return ceil(FILLINGS * settings.rollout_engine.max_num_seqs / settings.group_size / arms)
