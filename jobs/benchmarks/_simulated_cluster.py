"""A simulated cluster for `rollout_scale.py`: engines and a learner that sleep instead of computing.

Only the computing is simulated. The coordinator, its queue, the reward workers and every message between them are those
of stage 2, on a local Ray; several simulated engines share a process, as asynchronous tasks.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.policy import Policy, PolicyReceiver

ENGINES_PER_PROCESS = 8
SHOWN_TOKENS = 4
"""Tokens a completion carries; its length is in the time it takes, not in its payload."""


@dataclass(frozen=True)
class Load:
    """How long what takes."""

    slots: int
    """Sequences an engine decodes at once, each at the same speed."""
    median_s: float
    """Median time of a sequence; lengths are log-normal, as those of chains of thought are."""
    sigma: float = 0.6
    longest: float = 4.0
    """Where the length limit cuts, in medians."""

    def draw(self, generator: random.Random) -> float:
        """Seconds of one sequence."""
        return self.median_s * min(self.longest, generator.lognormvariate(0.0, self.sigma))

    def mean(self) -> float:
        """Mean seconds of a sequence, by drawing many."""
        generator = random.Random(0)
        return sum(self.draw(generator) for _ in range(100_000)) / 100_000


class SleepingEngines:
    """Asynchronous Ray actor: several simulated engines, addressed by number."""

    def __init__(self, load: Load, right: int, wrong: int) -> None:
        """`right`, `wrong`: tokens that every other completion consists of, so that each group has a spread."""
        self._load = load
        self._tokens = (right, wrong)
        self._slots = [asyncio.Semaphore(load.slots) for _ in range(ENGINES_PER_PROCESS)]
        self._received = [PolicyReceiver() for _ in range(ENGINES_PER_PROCESS)]
        self._version = [0] * ENGINES_PER_PROCESS
        self._generator = random.Random(0)

    async def load_policy(self, engine: int, policy: Policy) -> str:
        self._received[engine].adapter(policy)
        self._version[engine] = policy.version
        return policy.digest

    async def generate(self, engine: int, prompts: list[list[int]], sampling: dict[str, Any]) -> list[list[Completion]]:
        return [
            list(await asyncio.gather(*(self._sequence(engine, index) for index in range(sampling["n"]))))
            for _ in prompts
        ]

    async def _sequence(self, engine: int, index: int) -> Completion:
        version = self._version[engine]
        async with self._slots[engine]:
            await asyncio.sleep(self._load.draw(self._generator))
        return Completion([self._tokens[index % 2]] * SHOWN_TOKENS, [-1.0] * SHOWN_TOKENS, True, version)


class Handle:
    """One simulated engine with the methods of an `EngineActor` handle."""

    def __init__(self, actor: Any, number: int) -> None:
        self.generate = _Method(actor.generate, number)
        self.load_policy = _Method(actor.load_policy, number)
        self.start = _Answer({"pid": 0})
        self.leave = _Answer(None)


class _Method:
    def __init__(self, method: Any, number: int) -> None:
        self._method, self._number = method, number

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._number, *arguments)


class _Answer:
    def __init__(self, value: Any) -> None:
        self._value = value

    async def remote(self) -> Any:
        return self._value


class Engines:
    """Makes handles one after another; what a coordinator is given to start its engines with."""

    def __init__(self, count: int, load: Load, right: int, wrong: int) -> None:
        import ray

        actor = ray.remote(SleepingEngines).options(num_cpus=0, max_concurrency=10_000)
        self._actors = [actor.remote(load, right, wrong) for _ in range(-(-count // ENGINES_PER_PROCESS))]
        self._made = 0

    def __call__(self) -> Handle:
        number = self._made
        self._made += 1
        return Handle(self._actors[number // ENGINES_PER_PROCESS], number % ENGINES_PER_PROCESS)

    def stop(self) -> None:
        """End the processes."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
