"""The rollout engines of a run: chooses an engine for each request, replaces dead or hanging ones, and publishes
policies to all.

An engine that dies, or no longer answers the heartbeat, is rebuilt. Meanwhile the others continue its groups, from the
tokens last seen of them. The new engine gets no request until it is verified to serve the current policy. A slow group
does not mean a hanging engine: a healthy one may have many groups before it.

Extra engines join in the same way, whenever the cluster has room for one. They leave when the learners restart, which
may need that room.

Only a policy's note passes through here. The engines fetch the policy from the object store, once for each node. Its
owner is the learner that made it; if that learner dies, the policy is lost, not the engine: the next learner publishes
another.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorapar_ray.engines.policy import PolicyNote
from lorapar_ray.engines.record import GroupHead
from lorapar_ray.grpo.canaries import Canary
from lorapar_ray.grpo.engine_losses import fetch_failed, is_dead, is_lost, leave
from lorapar_ray.grpo.policy_proof import PolicyLost, PolicyMismatch, gaps_of, prove
from lorapar_ray.grpo.routing import Router, beginnings_of
from lorapar_ray.waiting import awaited

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOSSES = 5
"""Engines lost in one place between two policies before the run stops: more mean a broken setup."""
REBUILD_LIMIT_S = 1800.0
"""How long the run waits while it has no engine; a cluster may have to add a node first."""
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
            extra: number of further places, each empty until its engine has started (see `grow`).
            at_once: most requests in flight per engine; later ones wait for the first engine with room.
            tolerance: the largest canary gap, in nats.
            time_limit_s: for a heartbeat, and for loading and verifying a policy.
        """
        self._start = start
        self._fewest, self._size = size, size + extra
        self._empty = set(range(self._fewest, self._size))
        """Places for which no engine is wanted now."""
        self._router = Router(self._size, at_once)
        self._waiting: deque[_Waiting] = deque()
        self._rollouts: dict[str, _Rollout] = {}
        """Groups in flight by key."""
        self._gone: dict[int, asyncio.Future[None]] = {}
        """By place; set when its engine no longer answers, to end all waits for it."""
        self._seen: dict[int, tuple[Any, Any, dict[str, int]]] = {}
        """By place: its engine, a reference to its groups as last seen, and each group's number of tokens."""
        self._watches: list[asyncio.Task[None]] = []
        self.tolerance = tolerance
        self._time_limit_s = time_limit_s
        self._engines: list[Any] = []
        self._rebuilding: dict[int, asyncio.Task[None]] = {}
        self._losses = [0] * self._size
        self._gaps = [0.0] * self._size
        self._replaced = 0
        self._current: PolicyNote | None = None
        self._whole: PolicyNote | None = None
        """The whole policy to which the current policy's changes apply."""
        self._newer = asyncio.Event()
        self._canaries: Sequence[Canary] = ()
        self._published = 0
        self._started: asyncio.Future[Any] | None = None

    async def start(self) -> list[dict[str, Any]]:
        """Start every engine; returns what each reports. A policy may be published meanwhile: it waits."""
        self.begin_to_start()
        assert self._started is not None
        return list(await self._started)

    def begin_to_start(self) -> None:
        """Start every engine, unless that has begun."""
        if self._started is None:
            first = [self._start(slot) for slot in range(self._fewest)]
            self._engines = [*first, *[None] * (self._size - self._fewest)]
            self._started = asyncio.gather(*(engine.start.remote() for engine in first))
            self._watches = [asyncio.create_task(self._watch(slot)) for slot in range(self._size)]

    def grow(self) -> None:
        """Begin to start the extra engines. Each waits for room in the cluster; nothing waits for them."""
        for slot in sorted(self._empty):
            self._rebuild_by(slot, self._fill(slot))
        self._empty.clear()

    async def make_room(self) -> None:
        """End the extra engines until `grow` is called; the other engines take over their groups."""
        extra = set(range(self._fewest, self._size)) - self._empty
        self._empty |= extra
        starting = [self._rebuilding.pop(slot) for slot in extra if slot in self._rebuilding]
        for task in starting:
            task.cancel()
        for slot in extra:
            self._let_go(slot)
        leaving = [engine for slot in extra if (engine := self._engines[slot]) is not None]
        for slot in extra:
            self._engines[slot] = None
        await asyncio.gather(*starting, *map(leave, leaving), return_exceptions=True)

    async def run(self, call: Callable[[Any], Any]) -> Any:
        """`call(engine)` on the least loaded engine, in the order of calls; if it is lost, on another."""
        while True:
            slot = await self._turn()
            engine = self._engines[slot]
            try:
                return await self._unless_gone(slot, awaited(call(engine)))
            except Exception as error:
                if not is_lost(error):
                    raise
                self._rebuild(slot, engine, error)
            finally:
                self._end(slot)

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
            slot = await self._turn(beginnings, again=begun is not None, avoid=gave_it_back)
            engine, began = self._engines[slot], time.monotonic()
            rollout = self._rollouts[key] = _Rollout(slot, began, given_back=gave_it_back is not None)
            tokens = 0
            try:
                record, head = engine.rollout.options(num_returns=2).remote(prompt_ids, sampling, key, begun)
                found: GroupHead = await self._unless_gone(slot, awaited(head))
            except asyncio.CancelledError:
                engine.give_back.remote(key)  # no longer needed
                raise
            except Exception as error:
                if fetch_failed(error):
                    begun, known = None, 0  # its tokens are lost; begin again
                elif is_lost(error):
                    whose, seen, lengths = self._seen.get(slot, (None, None, {}))
                    if whose is engine and key in lengths:
                        begun, known = seen, lengths[key]
                    self._rebuild(slot, engine, error)
                else:
                    raise
            else:
                tokens = sum(found.lengths) - known
                if not found.open:
                    return record, found
                begun, known, gave_it_back = record, sum(found.lengths), slot
            finally:
                if self._rollouts.get(key) is rollout:
                    del self._rollouts[key]
                self._end(slot, tokens, time.monotonic() - began if tokens and not known else None)

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
            slot = await self._turn(beginnings, again=lost is not None, avoid=lost)
            engine, began, tokens = self._engines[slot], time.monotonic(), 0
            gone = self._gone_future(slot)
            try:
                record, head = play(engine)
                found: GroupHead = await self._unless_gone(slot, awaited(head))
                if not found.open:
                    tokens = sum(found.trained)
                    return record, found
                await self._look(slot, engine)
            except TimeoutError:
                if not gone.done():
                    raise
            finally:
                self._end(slot, tokens, time.monotonic() - began if tokens else None)
            lost = slot

    async def _look(self, slot: int, engine: Any) -> None:
        """Request an engine's heartbeat and its groups' progress; rebuild it if it does not answer."""
        try:
            records, lengths = engine.progress.options(num_returns=2).remote()
            async with asyncio.timeout(self._time_limit_s):  # `wait_for` may swallow this task's cancellation
                self._seen[slot] = engine, records, await lengths
        except Exception as error:
            if not is_lost(error):
                error = TimeoutError(f"rollout engine {slot} did not answer the heartbeat: {error}")
            self._rebuild(slot, engine, error)

    async def _turn(self, beginnings: Sequence[int] = (), again: bool = False, avoid: int | None = None) -> int:
        """Take a place on an engine with room; first come, first served.

        Args:
            again: served before all others, since it has waited already.
            avoid: an engine to use only if there is no other.
        """
        await self._alive()
        waiting = _Waiting(beginnings, avoid, asyncio.get_running_loop().create_future())
        self._waiting.appendleft(waiting) if again else self._waiting.append(waiting)
        self._deal()
        try:
            return await waiting.slot
        except asyncio.CancelledError:
            if waiting.slot.done() and not waiting.slot.cancelled():
                self._end(waiting.slot.result())
            raise

    def _deal(self) -> None:
        """Assign engines with room to the waiting requests."""
        while self._waiting:
            waiting = self._waiting[0]
            if not waiting.slot.done():
                alive = self._working()
                wanted = [slot for slot in alive if slot != waiting.avoid] or alive
                slot = self._router.choose(wanted, waiting.beginnings)
                if slot is None:
                    return
                self._begin(slot, waiting.beginnings)
                waiting.slot.set_result(slot)
            self._waiting.popleft()

    async def _unless_gone(self, slot: int, answer: Any) -> Any:
        """An engine's answer.

        Raises:
            TimeoutError: the engine no longer answers the heartbeat.
        """
        gone, task = self._gone_future(slot), asyncio.ensure_future(answer)
        try:
            await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise TimeoutError(f"rollout engine {slot} does not answer")
            return task.result()
        finally:
            task.cancel()

    def _gone_future(self, slot: int) -> asyncio.Future[None]:
        if slot not in self._gone:
            self._gone[slot] = asyncio.get_running_loop().create_future()
        return self._gone[slot]

    async def _watch(self, slot: int) -> None:
        """Monitor one place: its engine's heartbeat, its groups' progress, and stragglers."""
        while True:
            await asyncio.sleep(LOOK_S)
            if slot not in self._working() or not self._router.load[slot]:
                continue
            engine = self._engines[slot]
            await self._look(slot, engine)
            if slot in self._working():
                self._hand_on_stragglers(slot, engine)

    def _hand_on_stragglers(self, slot: int, engine: Any) -> None:
        usual = self._router.typical
        others = (each for each in self._working() if each != slot)
        if usual is None or self._waiting or all(self._router.load[each] for each in others):
            return
        now = time.monotonic()
        for key, rollout in self._rollouts.items():
            if rollout.slot == slot and not rollout.given_back and now - rollout.began > STRAGGLER * usual:
                rollout.given_back = True
                engine.give_back.remote(key)
                return

    async def base_gap(self, canaries: Sequence[Canary]) -> float:
        """The largest canary gap before any policy is served, in nats: it is due to numerics alone.

        Args:
            canaries: with the learner's log-probabilities under the base without an adapter.
        """
        await self._all_started()
        slots = await self._alive()
        found = await asyncio.gather(*(gaps_of(self._engines[slot], canaries) for slot in slots))
        return max(max(gaps.values()) for gaps in found)

    async def publish(self, policy: PolicyNote, canaries: Sequence[Canary]) -> float:
        """Serve a policy on every engine and verify it; returns the largest canary gap, in nats.

        Does not wait for engines that are being rebuilt, unless there is no other: they are verified before their first
        request.

        Raises:
            PolicyMismatch: an engine loaded another adapter, or its log-probabilities of the canary tokens are further
                from the learner's than the tolerance.
            PolicyLost: the learner that made it has died.
        """
        await self._all_started()
        self._current, self._canaries = policy, canaries
        if policy.kind == "whole":
            self._whole = policy
        self._published += 1
        self._newer.set()
        self._newer = asyncio.Event()
        await asyncio.gather(*(self._serve(slot, policy, canaries) for slot in await self._alive()))
        return max(self._gaps[slot] for slot in await self._alive())

    async def _all_started(self) -> None:
        if self._started is not None:
            await asyncio.shield(self._started)

    async def _serve(self, slot: int, policy: PolicyNote, canaries: Sequence[Canary]) -> None:
        engine = self._engines[slot]
        try:
            gap = await asyncio.wait_for(prove(slot, engine, policy, canaries, self.tolerance), self._time_limit_s)
        except Exception as error:
            if not is_lost(error):
                raise
            self._rebuild(slot, engine, error)
        else:
            self._gaps[slot], self._losses[slot] = gap, 0

    async def _alive(self) -> list[int]:
        """The places whose engine is available; waits while there is none.

        Raises:
            RuntimeError: a place lost too many engines, or no engine could be rebuilt in time.
        """
        deadline = time.monotonic() + REBUILD_LIMIT_S
        while True:
            for slot, task in list(self._rebuilding.items()):
                if task.done():
                    del self._rebuilding[slot]
                    task.result()
            if alive := self._working():
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
        """Begin to replace the engine of `slot`, unless that has begun; all waits for its answers end."""
        if self._engines[slot] is lost and slot not in self._rebuilding:
            self._rebuild_by(slot, self._replace(slot, lost, error))
            self._let_go(slot)

    def _rebuild_by(self, slot: int, work: Coroutine[Any, Any, None]) -> None:
        self._rebuilding[slot] = task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._rebuilt())

    def _let_go(self, slot: int) -> None:
        """End every wait for an answer of the engine in `slot`."""
        if (gone := self._gone.pop(slot, None)) is not None and not gone.done():
            gone.set_result(None)

    def _working(self) -> list[int]:
        """The places whose engine can be asked."""
        return [slot for slot in range(self._size) if slot not in self._rebuilding and slot not in self._empty]

    def _rebuilt(self) -> None:
        """Give the rebuilt engine, or the error, to the waiting requests."""
        failed = [task.exception() for task in self._rebuilding.values() if task.done() and not task.cancelled()]
        for error in filter(None, failed):
            for waiting in self._waiting:
                if not waiting.slot.done():
                    waiting.slot.set_exception(error)
        for slot, task in list(self._rebuilding.items()):
            if task.done() and not task.cancelled() and task.exception() is None:
                del self._rebuilding[slot]
        self._deal()

    async def _replace(self, slot: int, lost: Any, error: Exception) -> None:
        """Put a new engine that serves the current policy into `slot`; repeat if the new one dies before."""
        while True:
            if not is_dead(error):
                await leave(lost)  # else it keeps its resources
            self._losses[slot] += 1
            if self._losses[slot] > LOSSES:
                raise RuntimeError(
                    f"rollout engine {slot} was lost {LOSSES} times; see the Ray logs of EngineActor, or raise "
                    f"grpo.rollout_time_limit_s ({self._time_limit_s:g}) if requests take longer than that"
                ) from error
            self._replaced += 1
            lost = self._start(slot)
            try:
                return await self._put(slot, lost)
            except PolicyMismatch:
                raise
            except Exception as another:
                error = another

    async def _fill(self, slot: int) -> None:
        """Put an engine that serves the current policy into an empty `slot`."""
        engine = self._start(slot)
        try:
            await self._put(slot, engine)
        except PolicyMismatch:
            raise
        except Exception as error:
            await self._replace(slot, engine, error)

    async def _put(self, slot: int, engine: Any) -> None:
        """Start an engine, bring it to the current policy, and put it into `slot`."""
        try:
            await engine.start.remote()
            await self._catch_up(slot, engine)
        except asyncio.CancelledError:
            await leave(engine)
            raise
        self._engines[slot] = engine
        self._router.forget(slot)

    async def _catch_up(self, slot: int, engine: Any) -> None:
        """Load the current policy into a new engine, and the next one if it is published meanwhile."""
        proved = 0
        while proved != self._published:
            policy, whole, newer = self._current, self._whole, self._newer
            assert policy is not None and whole is not None
            published = self._published
            try:
                earlier = [] if policy is whole else [whole.reference]
                self._gaps[slot] = await prove(slot, engine, policy, self._canaries, self.tolerance, *earlier)
            except PolicyLost:
                await newer.wait()  # the restarted learners publish again
            else:
                proved = published

    @property
    def replaced(self) -> int:
        """Engines replaced so far."""
        return self._replaced

    @property
    def working(self) -> int:
        """Engines that can be asked now."""
        return len(self._working())

    def busy_seconds(self) -> float:
        """Seconds with a request in flight, summed over the engines since they started."""
        return self._router.busy_seconds(time.monotonic())

    async def stop(self) -> None:
        """End every engine."""
        for task in [*self._watches, *self._rebuilding.values()]:
            task.cancel()
        await asyncio.gather(*self._rebuilding.values(), return_exceptions=True)
        await asyncio.gather(*(leave(engine) for engine in self._engines if engine is not None))

    def _begin(self, slot: int, beginnings: Sequence[int]) -> None:
        self._router.begin(slot, beginnings, time.monotonic())

    def _end(self, slot: int, tokens: int = 0, duration: float | None = None) -> None:
        self._router.end(slot, time.monotonic(), tokens, duration)
        self._deal()


@dataclass
class _Waiting:
    """A request that waits for an engine."""

    beginnings: Sequence[int]
    avoid: int | None
    slot: asyncio.Future[int]


@dataclass
class _Rollout:
    """A group in flight."""

    slot: int
    began: float
    given_back: bool
