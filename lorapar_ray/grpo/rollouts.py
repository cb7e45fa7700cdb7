"""Groups of completions: sampled by an engine with room, then rewarded by the reward workers.

This process keeps a group's reference in the object store, its lengths and its rewards. The engine's call
returns the record and its head as two objects, both owned by this process: the record stays on the engine's node,
survives the engine, and is fetched by the reward worker and the learners that need it. It is lost with its node.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import zlib
from collections.abc import Sequence
from typing import Any

from lorapar_ray.config import ENVIRONMENT, GrpoConfig
from lorapar_ray.datasets.tokens import prompt_ids_of
from lorapar_ray.grpo.engine_pool import EnginePool
from lorapar_ray.grpo.environments.actor import EnvironmentWorkers
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.rewards import RewardBatch
from lorapar_ray.grpo.rewards.actor import RecordLost, RewardWorkers
from lorapar_ray.grpo.rewards.pool import with_part


class Rollouts:
    """Samples and rewards groups; many calls run concurrently in one event loop."""

    def __init__(
        self,
        settings: GrpoConfig,
        plan: dict[str, Any],
        end_ids: Sequence[int],
        engines: EnginePool,
        rewards: RewardWorkers,
        environments: EnvironmentWorkers | None = None,
    ) -> None:
        """Store the arguments; `plan`: see `Coordinator`.

        Args:
            end_ids: tokens at which sampling stops.
            environments: plays `grpo.environment`; None: a completion is one answer.
        """
        self._settings = settings
        self._rows: Sequence[dict[str, Any]] = plan["rows"]
        self._steps, self._seed = plan["steps"], plan["seed"]
        self._end_ids, self._engines, self._rewards = list(end_ids), engines, rewards
        self._environments = environments
        self._numbers = itertools.count()
        self.lost = 0
        """Groups that were lost with a node and sampled again."""

    async def groups(self, indices: Sequence[int], step: int, attempt: int) -> list[Group]:
        """The groups of these prompts, rewarded, in their order."""
        return list(await asyncio.gather(*(self._group(index, step, attempt) for index in indices)))

    async def _group(self, index: int, step: int, attempt: int) -> Group:
        """A prompt's completions and their rewards; sampled again if they are lost with their node in between."""
        while True:
            group = await self.sample(index, step, attempt)
            try:
                await self.reward(group, step)
            except RecordLost:
                self.lost += 1
            else:
                return group

    async def sample(self, index: int, step: int, attempt: int) -> Group:
        """Completions of prompt `index`, seeded by run, step, attempt and prompt."""
        settings, prompt_ids = self._settings, prompt_ids_of(self._rows, index)
        sampling = {
            "n": settings.group_size,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "max_tokens": settings.max_completion_length,
            "stop": list(settings.stop),
            "stop_token_ids": self._end_ids,
            "seed": zlib.crc32(f"{self._seed}/{step}/{attempt}/{index}".encode()),
        }
        key = f"{step}/{attempt}/{index}/{next(self._numbers)}"
        if self._environments is not None:
            played = self._environments.play(self._engines, key, index, prompt_ids, sampling)
            return Group(index, *await played)
        return Group(index, *await self._engines.rollout(key, prompt_ids, sampling))

    async def reward(self, group: Group, step: int) -> None:
        """Fill in the group's rewards.

        Raises:
            RecordLost: the record was lost with its node.
        """
        start, head = time.monotonic(), group.head
        scored = RewardBatch([0.0] * len(head.lengths), {}, {})
        if head.lengths and any(reward.name != ENVIRONMENT for reward in self._settings.rewards):
            scored = await self._rewards.score(group.index, group.record, step)
        for reward in self._settings.rewards:
            if reward.name == ENVIRONMENT:
                order = [each.name for each in self._settings.rewards]
                given = list(head.rewards)
                scored = with_part(scored, ENVIRONMENT, reward.weight, given, order, error="it gave no reward")
        group.take(scored, self._settings)
        group.reward_seconds = time.monotonic() - start
