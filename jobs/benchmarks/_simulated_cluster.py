"""A simulated cluster for `rollout_scale.py`: engines, rewards and a learner that sleep instead of computing.

Only computation is simulated. The coordinator, its queue, the records in the object store and all messages are those of
stage 2, on a local Ray. Several simulated engines share a process, as asynchronous tasks.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from lorapar_ray.engines.policy import Policy
from lorapar_ray.engines.record import GroupHead, GroupRecord
from lorapar_ray.grpo.rewards import RewardBatch
from lorapar_ray.grpo.rewards.reading import Request

ENGINES_PER_PROCESS = 32


@dataclass(frozen=True)
class Load:
    """Durations and numbers of tokens of the simulation."""

    slots: int
    """Sequences that an engine decodes at once, all at the same speed."""
    median_s: float
    """Median time of a sequence; lengths are log-normal, like those of chains of thought."""
    mean_tokens: int
    """Mean tokens of a sequence."""
    sigma: float = 0.6
    longest: float = 4.0
    """The length limit, in medians."""

    def draw(self, generator: random.Random) -> float:
        """One sequence's length, in medians."""
        return min(self.longest, generator.lognormvariate(0.0, self.sigma))

    def mean(self) -> float:
        """Mean of `draw`, from many draws."""
        generator = random.Random(0)
        return sum(self.draw(generator) for _ in range(100_000)) / 100_000


class SleepingEngines:
    """Asynchronous Ray actor: several simulated engines, addressed by name."""

    def __init__(self, load: Load) -> None:
        self._load, self._mean = load, load.mean()
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(load.slots))
        self._version: dict[str, int] = {}
        self._generator = random.Random(0)

    async def load_policy(self, engine: str, policy: Policy, *whole: Policy) -> str:
        self._version[engine] = policy.version
        return policy.digest

    async def rollout(
        self, engine: str, prompt_ids: list[int], sampling: dict[str, Any], key: str, begun: Any
    ) -> tuple[GroupRecord, GroupHead]:
        version, count = self._version[engine], sampling["n"]
        lengths = tuple(await asyncio.gather(*(self._sequence(engine) for _ in range(count))))
        head = GroupHead(len(prompt_ids), lengths, (True,) * count, (version,) * count)
        tokens = sum(lengths)
        ids, logprobs = np.full(tokens, version, np.int32), np.full(tokens, -1.0, np.float32)
        return GroupRecord(np.asarray(prompt_ids, np.int32), ids, logprobs, head), head

    async def progress(self, engine: str) -> tuple[dict[str, GroupRecord], dict[str, int]]:
        return {}, {}

    async def give_back(self, engine: str, key: str) -> None:
        """Does nothing: the simulated engine continues."""

    async def _sequence(self, engine: str) -> int:
        """Sleep for a sequence's time; returns its number of tokens."""
        length = self._load.draw(self._generator)
        async with self._slots[engine]:
            await asyncio.sleep(self._load.median_s * length)
        return max(1, round(length / self._mean * self._load.mean_tokens))


class SleepingRewards:
    """A reward worker that fetches each record, like a real one, but does not decode or judge it."""

    def __init__(self, plan: dict[str, Any]) -> None: ...

    def score(self, requests: list[Request]) -> list[RewardBatch]:
        counts = [len(ray.get(request.record).head.lengths) for request in requests]
        rewards = [[float(each % 2) for each in range(count)] for count in counts]
        return [RewardBatch(each, {"reward": list(each)}, {}) for each in rewards]


class Handle:
    """One simulated engine with the methods of an `EngineActor` handle."""

    def __init__(self, actor: Any, name: str) -> None:
        self.rollout = _Method(actor.rollout, name)
        self.load_policy = _Method(actor.load_policy, name)
        self.progress = _Method(actor.progress, name)
        self.give_back = _Method(actor.give_back, name)
        self.start = _Answer({"pid": 0})
        self.leave = _Answer(None)


class _Method:
    def __init__(self, method: Any, name: str) -> None:
        self._method, self._name = method, name

    def options(self, **options: Any) -> _Method:
        return _Method(self._method.options(**options), self._name)

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._name, *arguments)


class _Answer:
    def __init__(self, value: Any) -> None:
        self._value = value

    async def remote(self) -> Any:
        return self._value


class Engines:
    """The factory of engine handles for a coordinator.

    Each shard has its own copy: an engine's name contains the shard's process id.
    """

    def __init__(self, count: int, load: Load) -> None:
        actor = ray.remote(SleepingEngines).options(num_cpus=0, max_concurrency=10_000)
        self._actors = [actor.remote(load) for _ in range(-(-count // ENGINES_PER_PROCESS))]
        self._made = 0

    def __call__(self, slot: int) -> Handle:
        self._made += 1
        return Handle(self._actors[self._made % len(self._actors)], f"{os.getpid()}/{self._made}")

    def stop(self) -> None:
        """End the processes."""
        for actor in self._actors:
            ray.kill(actor)
