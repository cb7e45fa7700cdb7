"""Blocks of requests for the engines that there are, each engine with some blocks at a time.

An engine that joins gets blocks at once. Those of an engine that is lost go to the others, before all that wait.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lorapar_ray.engines.losses import is_lost
from lorapar_ray.engines.supervisor import LOSSES, EngineSupervisor
from lorapar_ray.waiting import awaited


class Asking:
    """The answers to some blocks under one policy; used in one event loop."""

    def __init__(
        self, engines: EngineSupervisor, blocks: Sequence[pa.Table], served: tuple[str, Sequence[Any]], at_once: int
    ) -> None:
        """Store what to ask.

        Args:
            blocks: each a `request_table`.
            served: digest and policy, as `AnsweringEngine.answer` takes them.
            at_once: most blocks with one engine.
        """
        self._engines, self._served, self._at_once = engines, served, at_once
        self._waiting = deque(_Block(table) for table in blocks)
        self._calls: dict[asyncio.Task[pa.Table | None], _Block] = {}
        self._ended = asyncio.Queue[asyncio.Task[pa.Table | None]]()
        """Those of the calls that have ended; also of engines that joined while `next` waits."""
        self._load = Counter[int]()
        """Blocks by place."""

    async def next(self) -> pa.Table | None:
        """The `answer_table` of the block that is finished next; None: there are no more.

        Raises:
            RuntimeError: a place lost too many engines, or a block was lost with too many.
            Exception: an engine refused a block.
        """
        while self._waiting or self._calls:
            if self._waiting:
                await self._engines.alive()
                self.send()
            call = await self._ended.get()
            block = self._calls.pop(call)
            table = call.result()
            if table is not None:
                return table
            self._waiting.appendleft(block)
        return None

    def send(self) -> None:
        """Give waiting blocks to engines with room, the one with the fewest blocks first."""
        working = self._engines.working()
        while self._waiting and working:
            slot = min(working, key=self._load.__getitem__)
            if self._load[slot] == self._at_once:
                return
            self._load[slot] += 1
            block = self._waiting.popleft()
            call = asyncio.create_task(self._call(slot, block))
            self._calls[call] = block
            call.add_done_callback(self._ended.put_nowait)

    async def _call(self, slot: int, block: _Block) -> pa.Table | None:
        """The answers to a block; None: its engine is lost, and is being replaced."""
        engine = self._engines.engines[slot]
        try:
            answer = engine.answer.remote(block.table, *self._served)
            table: pa.Table = await self._engines.unless_gone(slot, awaited(answer))
        except Exception as error:
            if not is_lost(error):
                raise
            self._engines.replace(slot, engine, error)
            block.losses += 1
            if block.losses == LOSSES:  # else requests that end every engine would never end
                raise RuntimeError(
                    f"{LOSSES} engines were lost, one after the other, with the same requests"
                ) from error
            return None
        finally:
            self._load[slot] -= 1
        self._engines.forget_losses(slot)
        return table

    def stop(self) -> None:
        """Wait for no more answers."""
        self._waiting.clear()
        for call in self._calls:
            call.cancel()


@dataclass(eq=False)
class _Block:
    """Requests that one engine gets together."""

    table: pa.Table
    losses: int = 0
    """Engines that were lost with them."""
