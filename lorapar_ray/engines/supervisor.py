"""Starts a stage's engines and replaces lost ones: stage 2's rollout engines, and the evaluation's.

An engine that dies, or no longer answers the heartbeat, is rebuilt. The new engine gets no request until it is verified
to serve the current policy.

Extra engines join in the same way, whenever the cluster has room for one. They leave when the learners restart, which
may need that room.

A place that loses one engine after another is given up: if sampling needs it, every later request fails with its error;
an extra place stays empty.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from lorapar_ray.engines.losses import is_dead, is_lost, leave
from lorapar_ray.engines.mismatch import PolicyMismatch
from lorapar_ray.progress import console
from lorapar_ray.text import markup, reason

LOSSES = 5
"""Engines lost in one place between two policies at which it is given up: so many mean a broken setup."""
REBUILD_LIMIT_S = 1800.0
"""How long the run waits while it has no engine; a cluster may have to add a node first."""


class EngineSupervisor:
    """Engines by place, from 0; used in one event loop."""

    def __init__(
        self,
        start: Callable[[int], Any],
        size: int,
        extra: int,
        prepare: Callable[[int, Any], Awaitable[None]],
        rebuilt: Callable[[BaseException | None], None],
        *,
        wait_s: float = REBUILD_LIMIT_S,
        what: str = "rollout engine",
        actor: str = "EngineActor",
        advice: str = "",
    ) -> None:
        """Store how to start the engines.

        Args:
            start, size, extra: see `EnginePool`.
            prepare: called with a place and its new engine, before that engine is used.
            rebuilt: called when a place has a new engine, or with the error if it cannot get one.
            wait_s: longest time without any engine.
            what, actor, advice: words for messages: an engine's name, whose logs to see, and what else to do.
        """
        self._start = start
        self._fewest, self._size = size, size + extra
        self._empty = set(range(self._fewest, self._size))
        """Places for which no engine is wanted now."""
        self._prepare, self._rebuilt = prepare, rebuilt
        self._wait_s = wait_s
        self._what, self._advice = what, f"see the Ray logs of {actor}{advice}"
        self.engines: list[Any] = []
        self.gone = defaultdict[int, asyncio.Future[None]](lambda: asyncio.get_running_loop().create_future())
        """By place; done when the engine that is there now no longer answers, to end all waits for it."""
        self._rebuilding: dict[int, asyncio.Task[None]] = {}
        """By place; a failed one stays, so that the place never counts as working again."""
        self._losses = [0] * self._size
        self.replaced = 0
        """Engines replaced so far."""
        self._started: asyncio.Future[Any] | None = None

    def start(self) -> None:
        """Begin to start the engines, but not the extra ones."""
        first = [self._start(slot) for slot in range(self._fewest)]
        self.engines = [*first, *[None] * (self._size - self._fewest)]
        self._started = asyncio.gather(*(self._first(slot, engine) for slot, engine in enumerate(first)))

    async def started(self) -> list[dict[str, Any]]:
        """Wait for the engines of `start`; returns what each reports, nothing if there are none yet.

        It does not wait for engines that replace those lost meanwhile.
        """
        told = [] if self._started is None else await asyncio.shield(self._started)
        return [each for each in told if each is not None]

    async def _first(self, slot: int, engine: Any) -> dict[str, Any] | None:
        """The report of the first engine in a place; None if it was lost while it started, and is being replaced."""
        try:
            report: dict[str, Any] = await engine.start.remote()
        except Exception as error:
            if not is_lost(error):
                raise
            self.replace(slot, engine, error)
            return None
        return report

    def grow(self) -> None:
        """Begin to start the extra engines. Each waits for room in the cluster; nothing waits for them."""
        for slot in sorted(self._empty):
            self._rebuild(slot, self._fill(slot))
        self._empty.clear()

    async def make_room(self) -> None:
        """End the extra engines until `grow` is called; the other engines take over their groups."""
        extra = set(range(self._fewest, self._size)) - self._empty
        self._empty |= extra
        starting = [self._rebuilding.pop(slot) for slot in extra if slot in self._rebuilding]
        for task in starting:
            task.cancel()
        leaving = [engine for slot in extra if (engine := self.engines[slot]) is not None]
        for slot in extra:
            self._let_go(slot)
            self.engines[slot] = None
        for slot in range(self._fewest, self._size):
            self._losses[slot] = 0  # also of places that were given up
        await asyncio.gather(*starting, *map(leave, leaving), return_exceptions=True)

    def working(self) -> list[int]:
        """The places whose engine can be asked."""
        return [slot for slot in range(self._size) if slot not in self._rebuilding and slot not in self._empty]

    async def alive(self) -> list[int]:
        """`working`; waits while there is none.

        Raises:
            RuntimeError: a place lost too many engines, or no engine could be rebuilt in time.
        """
        deadline = time.monotonic() + self._wait_s
        while True:
            for slot, task in list(self._rebuilding.items()):
                if task.done():
                    task.result()
                    del self._rebuilding[slot]
            if working := self.working():
                return working
            left = deadline - time.monotonic()
            done, _ = await asyncio.wait(
                self._rebuilding.values(),
                timeout=None if left == math.inf else max(0.0, left),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                raise RuntimeError(
                    f"every {self._what} was lost and none could start again within {self._wait_s:g} s; "
                    "see `ray status` for the room they need"
                )

    async def unless_gone(self, slot: int, answer: Awaitable[Any]) -> Any:
        """The answer of an engine.

        Raises:
            TimeoutError: the engine no longer answers the heartbeat.
        """
        gone, task = self.gone[slot], asyncio.ensure_future(answer)
        try:
            await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise TimeoutError(f"{self._what} {slot} does not answer")
            return task.result()
        finally:
            task.cancel()

    def forget_losses(self, slot: int) -> None:
        """Count the losses in `slot` from 0: its engine serves a new policy."""
        self._losses[slot] = 0

    def replace(self, slot: int, lost: Any, error: Exception) -> None:
        """Begin to replace the engine of `slot`, unless that has begun; all waits for its answers end."""
        if self.engines[slot] is lost and slot not in self._rebuilding:
            self._rebuild(slot, self._fill(slot, lost, error))
            self._let_go(slot)

    def _let_go(self, slot: int) -> None:
        """End every wait for an answer of the engine in `slot`."""
        if slot in self.gone:
            self.gone.pop(slot).set_result(None)

    def _rebuild(self, slot: int, work: Coroutine[Any, Any, None]) -> None:
        def end(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                return
            if task.exception() is None and self._rebuilding.get(slot) is task:
                del self._rebuilding[slot]  # an error stays, for `alive`
            self._rebuilt(task.exception())

        self._rebuilding[slot] = task = asyncio.create_task(work)
        task.add_done_callback(end)

    async def _fill(self, slot: int, lost: Any = None, error: Exception | None = None) -> None:
        """Put a new engine that serves the current policy into `slot`; repeat if the new one dies before.

        An extra place that lost too many is left empty.

        Args:
            lost, error: the engine to replace, and how it was lost; None if the place is empty.
        """
        while True:
            if error is not None and not await self._end_lost(slot, lost, error):
                return self._leave_empty(slot)
            lost = self._start(slot)
            try:
                return await self._put(slot, lost)
            except PolicyMismatch:
                raise
            except Exception as another:
                error = another

    async def _end_lost(self, slot: int, lost: Any, error: Exception) -> bool:
        """Free a lost engine's resources, and count the loss; returns whether another engine may start.

        Raises:
            RuntimeError: too many were lost in this place, and sampling needs it.
        """
        if not is_dead(error):
            await leave(lost)  # else it keeps its resources
        self._losses[slot] += 1
        if self._losses[slot] < LOSSES:
            self.replaced += 1
            console.print(f"  {self._what} {slot} was lost ({markup(reason(error))}); another one starts")
            return True
        if slot < self._fewest:
            raise RuntimeError(f"{self._what} {slot} was lost {LOSSES} times; {self._advice}") from error
        return False

    def _leave_empty(self, slot: int) -> None:
        """Give up an extra place until `grow` is called: the run goes on without it."""
        self._empty.add(slot)
        self.engines[slot] = None
        console.print(
            f"  {self._what} {slot}, an extra one, was lost {LOSSES} times; the run goes on without it; {self._advice}"
        )

    async def _put(self, slot: int, engine: Any) -> None:
        """Start an engine, bring it to the current policy, and put it into `slot`."""
        try:
            await engine.start.remote()
            await self._prepare(slot, engine)
        except asyncio.CancelledError:
            await leave(engine)
            raise
        self.engines[slot] = engine

    async def stop(self) -> None:
        """End every engine."""
        for task in self._rebuilding.values():
            task.cancel()
        await asyncio.gather(*self._rebuilding.values(), return_exceptions=True)
        await asyncio.gather(*(leave(engine) for engine in self.engines if engine is not None))
