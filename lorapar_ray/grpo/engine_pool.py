"""The rollout engines of a run: who is asked next, who has died or hangs, and which policy all of them serve.

An engine that dies, or does not answer within its time limit, is rebuilt while the others go on and take over its
requests. Its successor gets no request before it has proved that it serves the current policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from lorapar_ray.engines.policy import Policy, PolicyReceiver
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.canaries import Canary, canary_gap

LOSSES = 5
"""Engines lost in one place between two policies before the run stops: that is a broken setup, not bad luck."""
LEAVE_LIMIT_S = 10.0
"""What a hanging engine's actor is given to end its own children before it is killed."""
REBUILD_LIMIT_S = 1800.0
"""How long the run waits while it has no engine at all; a cluster may have to add a node first."""


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
        self.tolerance = tolerance
        self._time_limit_s = time_limit_s
        self._engines: list[Any] = []
        self._load = [0] * size
        self._busy_since = [0.0] * size
        self._busy_s = 0.0
        self._rebuilding: dict[int, asyncio.Task[None]] = {}
        self._losses = [0] * size
        self._gaps = [0.0] * size
        self._replaced = 0
        self._current = PolicyReceiver()
        self._canaries: Sequence[Canary] = ()
        self._published = 0
        self._started: asyncio.Future[Any] | None = None

    async def start(self) -> list[dict[str, Any]]:
        """Start every engine; returns what each says of itself. A policy may be published meanwhile: it waits."""
        self._engines = [self._start() for _ in range(self._size)]
        self._started = asyncio.gather(*(engine.start.remote() for engine in self._engines))
        return list(await self._started)

    async def run(self, call: Callable[[Any], Any]) -> Any:
        """`call(engine)` on the least loaded engine, in the order asked; if that is lost, on another."""
        async with self._room:
            while True:
                slot = min(await self._alive(), key=self._load.__getitem__)
                engine = self._engines[slot]
                self._begin(slot)
                try:
                    return await asyncio.wait_for(_awaited(call(engine)), self._time_limit_s)
                except Exception as error:
                    if not _lost(error):
                        raise
                    self._rebuild(slot, engine, error)
                finally:
                    self._end(slot)

    async def base_gap(self, canaries: Sequence[Canary]) -> float:
        """The largest canary gap before any policy is served: what numerics alone make of it.

        Args:
            canaries: with the learner's log-probabilities under the bare base.
        """
        await self._all_started()
        slots = await self._alive()
        found = await asyncio.gather(*(_gaps(self._engines[slot], canaries) for slot in slots))
        return max(max(gaps.values()) for gaps in found)

    async def publish(self, policy: Policy, canaries: Sequence[Canary]) -> float:
        """Serve `policy` on every engine and check that they do; returns the largest canary gap.

        Engines that are being rebuilt are not waited for, unless there is no other: they prove themselves before they
        are asked anything.

        Raises:
            PolicyMismatch: an engine loaded another adapter, or its log-probabilities of the canary tokens are further
                from the learner's than the tolerance.
        """
        import ray

        await self._all_started()
        self._current.adapter(policy)
        self._canaries = canaries
        self._published += 1
        message = ray.put(policy)  # one copy for each node, however many engines it has
        await asyncio.gather(*(self._serve(slot, message, policy, canaries) for slot in await self._alive()))
        return max(self._gaps[slot] for slot in await self._alive())

    async def _all_started(self) -> None:
        if self._started is not None:
            await asyncio.shield(self._started)

    async def _serve(self, slot: int, message: Any, policy: Policy, canaries: Sequence[Canary]) -> None:
        engine = self._engines[slot]
        try:
            gap = await asyncio.wait_for(self._proved(slot, engine, message, policy, canaries), self._time_limit_s)
        except Exception as error:
            if not _lost(error):
                raise
            self._rebuild(slot, engine, error)
        else:
            self._gaps[slot], self._losses[slot] = gap, 0

    async def _proved(self, slot: int, engine: Any, message: Any, policy: Policy, canaries: Sequence[Canary]) -> float:
        """Have an engine load the policy and prove it; returns the canary gap."""
        loaded = await engine.load_policy.remote(message)
        if loaded != policy.digest:
            raise PolicyMismatch(
                f"rollout engine {slot} loaded {loaded[:9]} as policy {policy.version}, not {policy.digest[:9]}"
            )
        gaps = await _gaps(engine, canaries)
        for what, gap in gaps.items():
            if not gap <= self.tolerance:
                raise PolicyMismatch(
                    f"rollout engine {slot} does not serve policy {policy.version}: {what} are {gap:.3f} nats off "
                    f"(grpo.canary_tolerance {self.tolerance:.3g})"
                )
        return max(gaps.values())

    async def _alive(self) -> list[int]:
        """The places whose engine can be asked; waits while there is none.

        Raises:
            RuntimeError: a place lost too many engines, or none could be rebuilt in time.
        """
        deadline = time.monotonic() + REBUILD_LIMIT_S
        while True:
            for slot, task in list(self._rebuilding.items()):
                if task.done():
                    del self._rebuilding[slot]
                    task.result()
            if alive := [slot for slot in range(self._size) if slot not in self._rebuilding]:
                return alive
            left = deadline - time.monotonic()
            done, _ = await asyncio.wait(
                self._rebuilding.values(), timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise RuntimeError(
                    f"every rollout engine was lost and none could start again within {REBUILD_LIMIT_S:g} s; "
                    "see `ray status` for the room they need"
                )

    def _rebuild(self, slot: int, lost: Any, error: Exception) -> None:
        """Begin to replace the engine of `slot`, unless that has begun."""
        if self._engines[slot] is lost and slot not in self._rebuilding:
            self._rebuilding[slot] = asyncio.create_task(self._replace(slot, lost, error))

    async def _replace(self, slot: int, lost: Any, error: Exception) -> None:
        """Put an engine that serves the current policy into `slot`; another one if it dies before it does."""
        while True:
            if not _dead(error):
                await _leave(lost)  # else it keeps its place
            self._losses[slot] += 1
            if self._losses[slot] > LOSSES:
                raise RuntimeError(
                    f"rollout engine {slot} was lost {LOSSES} times; see the Ray logs of EngineActor, or raise "
                    f"grpo.rollout_time_limit_s ({self._time_limit_s:g}) if requests take longer than that"
                ) from error
            self._replaced += 1
            lost = self._start()
            try:
                await lost.start.remote()
                await self._catch_up(slot, lost)
            except PolicyMismatch:
                raise
            except Exception as another:
                error = another
            except asyncio.CancelledError:
                await _leave(lost)
                raise
            else:
                self._engines[slot] = lost
                return

    async def _catch_up(self, slot: int, engine: Any) -> None:
        """Bring a fresh engine to the current policy, and to the next if that is published meanwhile."""
        import ray

        proved = 0
        while proved != self._published:
            proved, canaries = self._published, self._canaries
            if (policy := self._current.whole()) is not None:
                self._gaps[slot] = await self._proved(slot, engine, ray.put(policy), policy, canaries)

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
        for task in self._rebuilding.values():
            task.cancel()
        await asyncio.gather(*self._rebuilding.values(), return_exceptions=True)
        await asyncio.gather(*(_leave(engine) for engine in self._engines))

    def _begin(self, slot: int) -> None:
        if self._load[slot] == 0:
            self._busy_since[slot] = time.monotonic()
        self._load[slot] += 1

    def _end(self, slot: int) -> None:
        self._load[slot] -= 1
        if self._load[slot] == 0:
            self._busy_s += time.monotonic() - self._busy_since[slot]


async def _gaps(engine: Any, canaries: Sequence[Canary]) -> dict[str, float]:
    """In nats, by what was compared: an engine's canaries with the learner's, its decoding with its own prefill."""
    asked = [engine.score.remote(canary.token_ids, canary.start) for canary in canaries]
    asked += [engine.cache_gap.remote(canary.token_ids) for canary in canaries[:1]]  # one cache, one look
    answers = await asyncio.gather(*map(_awaited, asked))
    scored, cached = answers[: len(canaries)], answers[len(canaries) :]
    return {
        "its log-probabilities of the canary tokens": canary_gap(canaries, scored),
        "the tokens it decodes after a cached prompt": max(cached, default=0.0),
    }


async def _awaited(reference: Any) -> Any:
    """An object reference as a coroutine, which `asyncio.wait_for` and `gather` can cancel."""
    return await reference


async def _leave(engine: Any) -> None:
    """Ask an engine's actor to end its children and itself; kill it if it does not."""
    import ray

    with contextlib.suppress(Exception):
        await asyncio.wait_for(_awaited(engine.leave.remote()), LEAVE_LIMIT_S)
    ray.kill(engine)


def _lost(error: Exception) -> bool:
    """Whether an engine, or its answer, is gone, as against a request that it refused."""
    import ray

    gone = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError)
    return isinstance(error, (TimeoutError, *gone))


def _dead(error: Exception) -> bool:
    """Whether Ray knows that the actor has ended; else it may only be out of reach."""
    import ray

    return isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.OutOfMemoryError)
