"""Reward workers of a run: Ray actors around a `RewardPool` each, restarted by Ray when they die; and the judge.

They get references to records and return numbers; tokens and texts stay in the workers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from math import ceil
from typing import TYPE_CHECKING, Any

from lorapar_ray.config import REWARDED_ELSEWHERE, GrpoConfig
from lorapar_ray.datasets.chat import load_encoder_alone
from lorapar_ray.grpo.rewards.judge import Grades, Judge
from lorapar_ray.grpo.rewards.pool import RewardBatch, RewardPool, RewardSpec
from lorapar_ray.grpo.rewards.reading import Reader, Request
from lorapar_ray.waiting import awaited
from lorapar_ray.workers import ray_options

if TYPE_CHECKING:
    from collections.abc import Coroutine

AT_ONCE = 16
"""Most requests in one message to a worker: the first result waits for the last."""


class RecordLost(Exception):
    """A group's record was lost with its node before it was read; the group must be sampled again."""


class RewardActor:
    """One worker; a sample that breaks its process loses only its own reward (see `RewardPool`)."""

    def __init__(self, plan: dict[str, Any]) -> None:
        """`plan`: see `Coordinator`."""
        settings = GrpoConfig.model_validate(plan["settings"])
        self._reader = Reader(plan, settings, load_encoder_alone)  # rewards have processes of their own
        self._pool = RewardPool(
            [
                RewardSpec(each.name, each.weight, each.isolate)
                for each in settings.rewards
                if each.name not in REWARDED_ELSEWHERE
            ],
            time_limit_s=settings.reward_time_limit_s,
            memory_limit_mb=settings.reward_memory_mb,
            sandbox=settings.sandbox,
            withheld=plan.get("withheld", ()),
        )

    def score(self, requests: list[Request]) -> list[RewardBatch | None]:
        """As `RewardPool.score`, one request after the other; None if the record is lost."""
        return [self._score(request) for request in requests]

    def _score(self, request: Request) -> RewardBatch | None:
        answers = self._reader.read(request)
        return None if answers is None else self._pool.score(answers.prompts, answers.completions, answers.columns)


class JudgeActor:
    """Asynchronous: sends many groups to the judge's teachers at once."""

    def __init__(self, plan: dict[str, Any]) -> None:
        """`plan`: see `Coordinator`."""
        self._reader = Reader(plan, GrpoConfig.model_validate(plan["settings"]))
        self._judge = Judge(**plan["judge"])

    async def grades(self, request: Request) -> Grades | None:
        """As `Judge.grades`; None if the record is lost."""
        answers = await asyncio.to_thread(self._reader.read, request)
        if answers is None:
            return None
        return await self._judge.grades(answers.prompts, answers.completions, answers.columns["answer"])


class RewardWorkers:
    """Distributes requests over `grpo.reward_workers` actors; requests that arrive while all are busy are sent together
    later.

    Used in one event loop.
    """

    def __init__(self, plan: dict[str, Any], worker: type[Any] = RewardActor) -> None:
        """Start the workers, and the judge if there is one.

        Args:
            plan: see `Coordinator`.
            worker: the class of a worker, instead of `RewardActor`.
        """
        import ray

        settings = GrpoConfig.model_validate(plan["settings"])
        # scoring is stateless: the restarted worker retries its requests without limit
        again = {"max_restarts": -1, "max_task_retries": -1}
        actor = ray.remote(worker).options(**ray_options(settings.reward_resources), **again)
        self._actors = [actor.remote({**plan, "judge": None}) for _ in range(settings.reward_workers)]
        self._idle = deque(self._actors)
        self._waiting: deque[tuple[Request, asyncio.Future[RewardBatch]]] = deque()
        self._working: set[asyncio.Task[None]] = set()
        self._judge: Any = None
        if plan["judge"] is not None:
            self._judge = ray.remote(JudgeActor).options(num_cpus=0, max_concurrency=1000, **again).remote(plan)
        self._weights = {reward.name: reward.weight for reward in settings.rewards}

    async def score(self, index: int, record: Any, step: int) -> RewardBatch:
        """The rewards of a group from the first free worker; the judge, if any, grades at the same time.

        Raises:
            RecordLost: the group's record is lost.
        """
        request = Request(index, record, step)
        if self._judge is None:
            return await self._scored(request)
        grades: Grades | None
        scored, grades = await asyncio.gather(self._scored(request), awaited(self._judge.grades.remote(request)))
        if grades is None:
            raise RecordLost
        return grades.added_to(scored, self._weights)

    def _scored(self, request: Request) -> Coroutine[Any, Any, RewardBatch]:
        scoring: asyncio.Future[RewardBatch] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, scoring))
        self._deal()
        return awaited(scoring)

    def _deal(self) -> None:
        """Give every idle worker its part of the waiting requests."""
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
                    scoring.set_exception(RecordLost()) if batch is None else scoring.set_result(batch)
        self._idle.append(worker)
        self._deal()

    def stop(self) -> None:
        """End the workers and the judge."""
        import ray

        for actor in [*self._actors, *([] if self._judge is None else [self._judge])]:
            ray.kill(actor)
