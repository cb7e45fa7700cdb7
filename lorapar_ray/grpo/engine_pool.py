"""The rollout engines of a run: who is asked next, who has died or hangs, and which policy all of them serve.

An engine that dies, or does not answer within its time limit, is replaced; its successor is brought to the current
policy before it is asked anything, and whatever was asked of the lost one is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from lorapar_ray.engines.policy import Policy, PolicyReceiver
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.batches import Canary, canary_gap

LOSSES = 5
"""Engines lost in one place between two policies before the run stops: that is a broken setup, not bad luck."""
LEAVE_LIMIT_S = 10.0
"""What a hanging engine's actor is given to end its own children before it is killed."""


class PolicyMismatch(UserError):
    """An engine does not serve the policy it was sent: nothing sampled from it may be trained on."""


class EnginePool:
    """Asynchronous; lives in one event loop."""

    def __init__(
        self, start: Callable[[], Any], size: int, *, at_once: int, tolerance: float, time_limit_s: float
    ) -> None:
        """Take how to run the engines.

        Args:
            start: makes an engine's handle, with `start`, `load_policy`, `generate`, `score`, `cache_gap` and `leave`
                as `EngineActor` has them.
            size: how many engines.
            at_once: requests an engine holds; later ones wait for whichever engine has room first.
            tolerance: the largest canary gap, in nats.
            time_limit_s: for one request.
        """
        self._start = start
        self._size = size
        self._room = asyncio.Semaphore(size * at_once)
        self._tolerance = tolerance
        self._time_limit_s = time_limit_s
        self._engines: list[Any] = []
        self._load: list[int] = []
        self._busy_since: list[float] = []
        self._busy_s = 0.0
        self._replacing: list[asyncio.Lock] = []
        self._losses: list[int] = []
        self._replaced = 0
        self._current = PolicyReceiver()

    async def start(self) -> list[dict[str, int]]:
        """Start every engine; returns what each says of itself."""
        self._engines = [self._start() for _ in range(self._size)]
        self._load = [0] * self._size
        self._busy_since = [0.0] * self._size
        self._replacing = [asyncio.Lock() for _ in range(self._size)]
        self._losses = [0] * self._size
        return list(await asyncio.gather(*(engine.start.remote() for engine in self._engines)))

    async def run(self, call: Callable[[Any], Any]) -> Any:
        """`call(engine)` on the least loaded engine, in the order asked; if that is lost, on another."""
        async with self._room:
            while True:
                slot = min(range(self._size), key=self._load.__getitem__)
                engine = self._engines[slot]
                self._begin(slot)
                try:
                    return await asyncio.wait_for(_awaited(call(engine)), self._time_limit_s)
                except Exception as error:
                    if not _lost(error):
                        raise
                    await self._replace(slot, engine, hangs=isinstance(error, TimeoutError))
                finally:
                    self._end(slot)

    async def publish(self, policy: Policy, canaries: Sequence[Canary]) -> float:
        """Serve `policy` on every engine and check that they do; returns the largest canary gap.

        Raises:
            PolicyMismatch: an engine loaded another adapter, or its log-probabilities of the canary tokens are further
                from the learner's than the tolerance.
        """
        import ray

        self._current.adapter(policy)
        message = ray.put(policy)  # one copy for each node, however many engines it has
        return max(await asyncio.gather(*(self._serve(slot, message, policy, canaries) for slot in range(self._size))))

    async def _serve(self, slot: int, message: Any, policy: Policy, canaries: Sequence[Canary]) -> float:
        while True:
            engine = self._engines[slot]
            try:
                loaded = await asyncio.wait_for(_awaited(engine.load_policy.remote(message)), self._time_limit_s)
                if loaded != policy.digest:
                    raise PolicyMismatch(
                        f"rollout engine {slot} loaded {loaded[:9]} as policy {policy.version}, not {policy.digest[:9]}"
                    )
                asked = [engine.score.remote(canary.token_ids, canary.start) for canary in canaries]
                asked += [engine.cache_gap.remote(canary.token_ids) for canary in canaries[:1]]  # one cache, one look
                answers = await asyncio.wait_for(asyncio.gather(*map(_awaited, asked)), self._time_limit_s)
            except Exception as error:
                if not _lost(error):
                    raise
                await self._replace(slot, engine, hangs=isinstance(error, TimeoutError))
                continue
            scored, cached = answers[: len(canaries)], answers[len(canaries) :]
            gaps = {
                "its log-probabilities of the canary tokens": canary_gap(canaries, scored),
                "the tokens it decodes after a cached prompt": max(cached, default=0.0),
            }
            for what, gap in gaps.items():
                if not gap <= self._tolerance:
                    raise PolicyMismatch(
                        f"rollout engine {slot} does not serve policy {policy.version}: {what} are {gap:.3f} nats off "
                        f"(grpo.canary_tolerance {self._tolerance:g})"
                    )
            self._losses[slot] = 0
            return max(gaps.values())

    async def _replace(self, slot: int, lost: Any, hangs: bool) -> None:
        """Start another engine in `slot` and bring it to the current policy; one caller does it, the others wait."""
        async with self._replacing[slot]:
            if self._engines[slot] is not lost:
                return
            if hangs:
                await _end(lost)
            self._engines[slot] = await self._successor(slot)

    async def _successor(self, slot: int) -> Any:
        """A new engine that serves the current policy; another one if it dies before it does."""
        import ray

        while True:
            self._replaced += 1
            self._losses[slot] += 1
            if self._losses[slot] > LOSSES:
                raise RuntimeError(f"rollout engine {slot} was lost {LOSSES} times; see the Ray logs of EngineActor")
            engine = self._start()
            with contextlib.suppress(ray.exceptions.RayActorError):
                await engine.start.remote()
                if (policy := self._current.whole()) is not None:
                    await engine.load_policy.remote(ray.put(policy))
                return engine

    @property
    def replaced(self) -> int:
        """Engines replaced so far."""
        return self._replaced

    def busy_share(self, since: float, seconds_before: float) -> float:
        """Share of the engines' time with a request in flight, since the monotonic time `since`.

        Args:
            seconds_before: what `busy_seconds` gave at `since`.
        """
        elapsed = time.monotonic() - since
        return min(1.0, (self.busy_seconds() - seconds_before) / (elapsed * self._size)) if elapsed > 0 else 0.0

    def busy_seconds(self) -> float:
        """Seconds with a request in flight, summed over the engines since they started."""
        now = time.monotonic()
        running = [now - self._busy_since[slot] for slot in range(self._size) if self._load[slot]]
        return self._busy_s + sum(running)

    async def stop(self) -> None:
        """End every engine."""
        await asyncio.gather(*(_end(engine) for engine in self._engines))

    def _begin(self, slot: int) -> None:
        if self._load[slot] == 0:
            self._busy_since[slot] = time.monotonic()
        self._load[slot] += 1

    def _end(self, slot: int) -> None:
        self._load[slot] -= 1
        if self._load[slot] == 0:
            self._busy_s += time.monotonic() - self._busy_since[slot]


async def _awaited(reference: Any) -> Any:
    """An object reference as a coroutine, which `asyncio.wait_for` and `gather` can cancel."""
    return await reference


async def _end(engine: Any) -> None:
    """Ask an engine's actor to end its children and itself; kill it if it does not."""
    import ray

    with contextlib.suppress(Exception):
        await asyncio.wait_for(_awaited(engine.leave.remote()), LEAVE_LIMIT_S)
    ray.kill(engine)


def _lost(error: Exception) -> bool:
    """Whether an engine died or hangs, as against a request that it refused."""
    import ray

    return isinstance(error, TimeoutError | ray.exceptions.RayActorError)
