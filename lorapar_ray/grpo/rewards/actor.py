"""Reward workers of a run: Ray actors around a `RewardPool` each, restarted by Ray when they die; and the judge."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from lorapar_ray.config import JUDGE
from lorapar_ray.grpo.rewards.judge import Judge
from lorapar_ray.grpo.rewards.pool import RewardBatch, RewardPool, RewardSpec, with_part
from lorapar_ray.workers import ray_options

if TYPE_CHECKING:
    from lorapar_ray.config import GrpoConfig, SandboxConfig


Request = tuple[list[str], list[str], dict[str, list[Any]]]
"""Prompts, completions and the rows' further columns of one call of the rewards."""

AT_ONCE = 16
"""Requests in one message to a worker at most: the first has to wait for the last."""


class RewardActor:
    """One worker; a sample that breaks the process inside costs itself only (see `RewardPool`)."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        time_limit_s: float,
        memory_limit_mb: int,
        sandbox: SandboxConfig,
        withheld: Sequence[str],
    ) -> None:
        self._pool = RewardPool(
            list(specs),
            time_limit_s=time_limit_s,
            memory_limit_mb=memory_limit_mb,
            sandbox=sandbox,
            withheld=withheld,
        )

    def score(self, requests: list[Request]) -> list[RewardBatch]:
        """As `RewardPool.score`, one request after the other."""
        return [self._pool.score(*request) for request in requests]


class RewardWorkers:
    """Deals requests out to `grpo.reward_workers` actors; what comes while all are busy travels together later.

    Lives in one event loop.
    """

    def __init__(self, settings: GrpoConfig, judge: Judge | None = None, withheld: Sequence[str] = ()) -> None:
        """See `RewardPool` for `withheld`."""
        import ray

        # scoring has no memory: what a dead worker was asked is asked again of its successor, as often as it takes
        actor = ray.remote(RewardActor).options(
            **ray_options(settings.reward_resources), max_restarts=-1, max_task_retries=-1
        )
        specs = [
            RewardSpec(reward.name, reward.weight, reward.isolate)
            for reward in settings.rewards
            if reward.name != JUDGE
        ]
        limits = settings.reward_time_limit_s, settings.reward_memory_mb, settings.sandbox
        self._actors = [actor.remote(specs, *limits, list(withheld)) for _ in range(settings.reward_workers)]
        self._idle = deque(self._actors)
        self._waiting: deque[tuple[Request, asyncio.Future[RewardBatch]]] = deque()
        self._working: set[asyncio.Task[None]] = set()
        self._judge = judge
        self._weights = {reward.name: reward.weight for reward in settings.rewards}

    async def score(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> RewardBatch:
        """As `RewardPool.score`, on the first worker that is free, while the judge, if there is one, grades."""
        scoring: asyncio.Future[RewardBatch] = asyncio.get_running_loop().create_future()
        self._waiting.append(((prompts, completions, columns), scoring))
        self._deal()
        if self._judge is None:
            return await scoring
        grades = await self._judge.grades(prompts, completions, columns["answer"])
        return with_part(await scoring, JUDGE, self._weights[JUDGE], grades, list(self._weights))

    def _deal(self) -> None:
        """Give every idle worker its part of what waits."""
        while self._idle and self._waiting:
            part = min(AT_ONCE, ceil(len(self._waiting) / len(self._idle)))
            work = self._work(self._idle.popleft(), [self._waiting.popleft() for _ in range(part)])
            task = asyncio.create_task(work)
            self._working.add(task)
            task.add_done_callback(self._working.discard)

    async def _work(self, worker: Any, asked: list[tuple[Request, asyncio.Future[RewardBatch]]]) -> None:
        wanted = [(request, scoring) for request, scoring in asked if not scoring.done()]  # the rest was cancelled
        try:
            scored = await worker.score.remote([request for request, _ in wanted])
        except Exception as error:
            for _, scoring in wanted:
                if not scoring.done():
                    scoring.set_exception(error)
        else:
            for (_, scoring), batch in zip(wanted, scored, strict=True):
                if not scoring.done():
                    scoring.set_result(batch)
        self._idle.append(worker)
        self._deal()

    def stop(self) -> None:
        """End the workers."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
