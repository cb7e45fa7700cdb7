"""Reward workers of a run: Ray actors around a `RewardPool` each, restarted by Ray when they die; and the judge."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorapar_ray.config import JUDGE
from lorapar_ray.grpo.rewards.judge import Judge
from lorapar_ray.grpo.rewards.pool import RewardBatch, RewardPool, RewardSpec, with_part

if TYPE_CHECKING:
    from lorapar_ray.config import GrpoConfig


class RewardActor:
    """One worker; a sample that breaks the process inside costs itself only (see `RewardPool`)."""

    def __init__(self, specs: Sequence[RewardSpec], time_limit_s: float, memory_limit_mb: int) -> None:
        self._pool = RewardPool(list(specs), time_limit_s=time_limit_s, memory_limit_mb=memory_limit_mb)

    def score(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> RewardBatch:
        """As `RewardPool.score`."""
        return self._pool.score(prompts, completions, columns)


class RewardWorkers:
    """Deals completions out to `grpo.reward_workers` actors in turn."""

    def __init__(self, settings: GrpoConfig, judge: Judge | None = None) -> None:
        import ray

        # scoring has no memory: what a dead worker was asked is asked again of its successor, as often as it takes
        actor = ray.remote(RewardActor).options(
            num_cpus=settings.reward_resources.cpus, max_restarts=-1, max_task_retries=-1
        )
        specs = [RewardSpec(reward.name, reward.weight) for reward in settings.rewards if reward.name != JUDGE]
        limits = settings.reward_time_limit_s, settings.reward_memory_mb
        self._actors = [actor.remote(specs, *limits) for _ in range(settings.reward_workers)]
        self._turn = itertools.cycle(self._actors)
        self._judge = judge
        self._weights = {reward.name: reward.weight for reward in settings.rewards}

    async def score(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> RewardBatch:
        """As `RewardPool.score`, on the worker whose turn it is, while the judge, if there is one, grades."""
        scoring = next(self._turn).score.remote(prompts, completions, columns)
        if self._judge is None:
            scored: RewardBatch = await scoring
            return scored
        grades = await self._judge.grades(prompts, completions, columns["answer"])
        return with_part(await scoring, JUDGE, self._weights[JUDGE], grades, list(self._weights))

    def stop(self) -> None:
        """End the workers."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
