"""The rollout engines of a run, and the requests to them.

While an engine is rebuilt, the others continue its groups, from the tokens last seen of them. A slow group does not
mean a hanging engine: a healthy one may have many groups before it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorapar_ray.engines.losses import fetch_failed, is_lost
from lorapar_ray.engines.record import GroupHead
from lorapar_ray.engines.supervisor import EngineSupervisor
from lorapar_ray.grpo.request_queue import RequestQueue
from lorapar_ray.grpo.routing import Router, beginnings_of
from lorapar_ray.grpo.served_policy import ServedPolicy
from lorapar_ray.waiting import awaited

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOOK_S = 10.0
"""Seconds between two requests for an engine's heartbeat and its groups' progress."""
STRAGGLER = 3.0
"""A group that takes this many times the typical time is given back, once, if another engine is idle."""


class EnginePool:
    """Asynchronous; used in one event loop."""

    def __init__(
        self,
        start: Callable[[int], Any],
        size: int,
        *,
        extra: int = 0,
        at_once: int,
        tolerance: float,
        time_limit_s: float,
    ) -> None:
        """Store how to run the engines.

        Args:
            start: creates the engine of a place (from 0) and returns its handle, with `EngineActor`'s methods `start`,
                `load_policy`, `rollout`, `progress`, `give_back`, `score`, `cache_gap` and `leave`.
            size: number of engines that sampling needs before it begins.
            extra: number of further places, each empty until its engine has started (see `EngineSupervisor.grow`).
            at_once: most requests in flight per engine; later ones wait for the first engine with room.
            tolerance: the largest canary gap, in nats.
            time_limit_s: for a heartbeat, and for loading and verifying a policy.
        """
        self.supervisor = EngineSupervisor(
            start,
            size,
            extra,
            self._prepare,
            lambda error: self._queue.rebuilt(error),
            advice=f", or raise grpo.rollout_time_limit_s ({time_limit_s:g}) if requests take longer than that",
        )
        self._time_limit_s = time_limit_s
        self.policy = ServedPolicy(self.supervisor, tolerance, time_limit_s)
        self._router = Router(size + extra, at_once)
        self._queue = RequestQueue(self.supervisor, self._router)
        self._rollouts: dict[str, _Rollout] = {}
        """Groups in flight by key."""
        self._watches: list[asyncio.Task[None]] = []

    async def start(self) -> list[dict[str, Any]]:
        """Start every engine; returns what each reports. A policy may be published meanwhile: it waits."""
        self.begin_to_start()
        return await self.supervisor.started()

    def begin_to_start(self) -> None:
        """Start every engine, unless that has begun."""
        if not self._watches:
            self.supervisor.start()
            self._watches = [asyncio.create_task(self._watch(slot)) for slot in range(len(self.supervisor.engines))]

    async def rollout(
        self, key: str, prompt_ids: Sequence[int] | NDArray[Any], sampling: dict[str, Any]
    ) -> tuple[Any, GroupHead]:
        """Sample a group of completions of one prompt; returns a reference to its record, and its head.

        `Router.choose` selects an engine with room; if it is lost, or gives the group back, another continues the
        group, which then comes first in the queue.

        Args:
            key: of the group, unique among groups in flight.
        """
        beginnings, begun, known = beginnings_of(prompt_ids), None, 0
        gave_it_back: int | None = None
        while True:
            slot = await self._queue.turn(beginnings, again=begun is not None, avoid=gave_it_back)
            engine, began, tokens = self.supervisor.engines[slot], time.monotonic(), 0
            rollout = self._rollouts[key] = _Rollout(engine, began, given_back=gave_it_back is not None)
            try:
                record, head = engine.rollout.options(num_returns=2).remote(prompt_ids, sampling, key, begun)
                found: GroupHead = await self.supervisor.unless_gone(slot, awaited(head))
            except asyncio.CancelledError:
                engine.give_back.remote(key)  # no longer needed
                raise
            except Exception as error:
                if fetch_failed(error):
                    begun, known = None, 0  # its tokens are lost; begin again
                elif is_lost(error):
                    begun, known = rollout.seen or (begun, known)
                    self.supervisor.replace(slot, engine, error)
                else:
                    raise
            else:
                tokens = sum(found.lengths) - known
                if not found.open:
                    return record, found
                begun, known, gave_it_back = record, sum(found.lengths), slot
            finally:
                del self._rollouts[key]
                self._queue.end(slot, tokens, time.monotonic() - began if tokens and not known else None)

    async def episodes(
        self, prompt_ids: Sequence[int] | NDArray[Any], play: Callable[[Any], tuple[Any, Any]]
    ) -> tuple[Any, GroupHead]:
        """Play a group of episodes of an environment; returns a reference to its record, and its head.

        Args:
            play: called with an engine, it lets the group's worker begin or continue there, and returns references to
                both. An `open` head means that the engine is lost: another continues the group, first in the queue.

        Raises:
            RayActorError: the worker is lost.
        """
        beginnings, lost = beginnings_of(prompt_ids), None
        while True:
            slot = await self._queue.turn(beginnings, again=lost is not None, avoid=lost)
            engine, began, tokens = self.supervisor.engines[slot], time.monotonic(), 0
            gone = self.supervisor.gone[slot]
            try:
                record, head = play(engine)
                found: GroupHead = await self.supervisor.unless_gone(slot, awaited(head))
                if not found.open:
                    tokens = sum(found.trained)
                    return record, found
                await self._look(slot, engine)
            except TimeoutError:
                if not gone.done():
                    raise
            finally:
                self._queue.end(slot, tokens, time.monotonic() - began if tokens else None)
            lost = slot

    async def _watch(self, slot: int) -> None:
        """Monitor one place: its engine's heartbeat, its groups' progress, and stragglers."""
        while True:
            await asyncio.sleep(LOOK_S)
            if slot not in self.supervisor.working() or not self._router.load[slot]:
                continue
            engine = self.supervisor.engines[slot]
            await self._look(slot, engine)
            if slot in self.supervisor.working():
                self._give_back_straggler(slot, engine)

    async def _look(self, slot: int, engine: Any) -> None:
        """Request an engine's heartbeat and its groups' progress; rebuild it if it does not answer."""
        try:
            records, lengths = engine.progress.options(num_returns=2).remote()
            async with asyncio.timeout(self._time_limit_s):  # `wait_for` may swallow this task's cancellation
                tokens = await lengths
        except Exception as error:
            if not is_lost(error):
                error = TimeoutError(f"rollout engine {slot} did not answer the heartbeat: {error}")
            self.supervisor.replace(slot, engine, error)
        else:
            for key, rollout in self._rollouts.items():
                if rollout.engine is engine and key in tokens:
                    rollout.seen = records, tokens[key]

    def _give_back_straggler(self, slot: int, engine: Any) -> None:
        """Interrupt a slow group, so that an idle engine continues it.

        What is slow is known only after `routing.DURATIONS` groups. Episodes of an environment are never interrupted.
        """
        usual, load = self._router.typical, self._router.load
        others = (each for each in self.supervisor.working() if each != slot)
        if usual is None or len(self._queue) or all(load[each] for each in others):
            return
        now = time.monotonic()
        for key, rollout in self._rollouts.items():
            if rollout.engine is engine and not rollout.given_back and now - rollout.began > STRAGGLER * usual:
                rollout.given_back = True
                engine.give_back.remote(key)
                return

    async def _prepare(self, slot: int, engine: Any) -> None:
        """Bring a new engine to the current policy; nothing is known of its speed and its cache."""
        await self.policy.catch_up(slot, engine)
        self._router.forget(slot)

    def busy_seconds(self) -> float:
        """Seconds with a request in flight, summed over the engines since they started."""
        return self._router.busy_seconds(time.monotonic())

    async def stop(self) -> None:
        """End every engine."""
        for task in self._watches:
            task.cancel()
        await self.supervisor.stop()


@dataclass
class _Rollout:
    """A group in flight."""

    engine: Any
    began: float
    given_back: bool
    seen: tuple[Any, int] | None = None
    """A reference to the engine's groups as last seen, and this one's number of tokens."""
