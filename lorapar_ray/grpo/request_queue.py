"""Requests that wait for a rollout engine with room; first come, first served."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lorapar_ray.engines.supervisor import EngineSupervisor
from lorapar_ray.grpo.routing import Router


class RequestQueue:
    """Used in one event loop."""

    def __init__(self, supervisor: EngineSupervisor, router: Router) -> None:
        """Store the engines, and the router that chooses among those with room."""
        self._supervisor, self._router = supervisor, router
        self._waiting: deque[_Waiting] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    async def turn(self, beginnings: Sequence[int] = (), again: bool = False, avoid: int | None = None) -> int:
        """Wait for an engine with room, and take a place on it, until `end`.

        Args:
            beginnings: of the prompt, see `beginnings_of`.
            again: served before all others, since it has waited already.
            avoid: an engine to use only if there is no other.
        """
        await self._supervisor.alive()
        waiting = _Waiting(beginnings, avoid, asyncio.get_running_loop().create_future())
        self._waiting.appendleft(waiting) if again else self._waiting.append(waiting)
        self._deal()
        try:
            return await waiting.slot
        except asyncio.CancelledError:
            if waiting.slot.done() and not waiting.slot.cancelled():
                self.end(waiting.slot.result())
            raise

    def end(self, slot: int, tokens: int = 0, duration: float | None = None) -> None:
        """A request has left an engine; see `Router.end`."""
        self._router.end(slot, time.monotonic(), tokens, duration)
        self._deal()

    def _deal(self) -> None:
        """Assign engines with room to the waiting requests."""
        while self._waiting:
            waiting = self._waiting[0]
            if not waiting.slot.done():
                working = self._supervisor.working()
                wanted = [slot for slot in working if slot != waiting.avoid] or working
                slot = self._router.choose(wanted, waiting.beginnings)
                if slot is None:
                    return
                self._router.begin(slot, waiting.beginnings, time.monotonic())
                waiting.slot.set_result(slot)
            self._waiting.popleft()

    def rebuilt(self, error: BaseException | None) -> None:
        """Assign a new engine, or end every wait with the error of a place that cannot get one."""
        if error is not None:
            for waiting in self._waiting:
                if not waiting.slot.done():
                    waiting.slot.set_exception(error)
        self._deal()


@dataclass
class _Waiting:
    """A request that waits for an engine."""

    beginnings: Sequence[int]
    avoid: int | None
    slot: asyncio.Future[int]
