"""Some vLLM engines that share requests: a fixed number, or as many as the cluster has room for.

    requests ─► blocks ─► the engine with the fewest blocks ─► answers, as they are finished

The driver gives each engine two batches at a time and keeps the rest, which is all the queue that there is. Engines
start, join and are replaced as stage 2's are (`EngineSupervisor`). They outlive one stream of requests, since each
takes up to a minute to start; between two streams they change policy.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from threading import Thread
from typing import Any, TypeVar

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.answering import AnsweringEngine
from lorapar_ray.engines.kept import end
from lorapar_ray.engines.policy import Policy
from lorapar_ray.engines.requests import Answer, Request, answers_of, request_table
from lorapar_ray.engines.supervisor import EngineSupervisor
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.asking import Asking
from lorapar_ray.memory_shortage import out_of_memory
from lorapar_ray.text import reason

REQUESTS_PER_BLOCK = 16

T = TypeVar("T")


class Engines:
    """Use as a context manager, or `close` them."""

    def __init__(
        self,
        model: str,
        settings: EngineConfig,
        resources: Resources,
        count: int = 1,
        *,
        most: int | None = None,
        seed: int = 0,
        where: str = "evaluate.engine",
        trust_remote_code: bool = False,
        sync: str = "merged",
        max_lora_rank: int | None = None,
        running: Sequence[Any] = (),
    ) -> None:
        """Store how to start the engines; `start` starts them, or the first request.

        Args:
            model: what vLLM loads: a directory or a hub name.
            count: engines, with `most` the fewest.
            most: None: always `count`. Else another engine joins whenever the cluster has room for it, up to this
                number.
            sync: `merged` or `adapter` (see `start_engine`).
            running: actors of such engines, in place of the first ones.
        """
        new = partial(
            start_engine,
            model,
            settings,
            resources,
            seed=seed,
            where=where,
            trust_remote_code=trust_remote_code,
            sync=sync,
            max_lora_rank=max_lora_rank,
            actor=AnsweringEngine,
        )
        self._running = list(running[:count])
        self._supervisor = EngineSupervisor(
            lambda _: self._running.pop(0) if self._running else new(),
            count,
            0 if most is None else most - count,
            _nothing,
            self._rebuilt,
            wait_s=math.inf,  # the stage says for what it waits
            what="engine",
            actor="AnsweringEngine",
        )
        self._at_once = -(-2 * settings.max_num_seqs // REQUESTS_PER_BLOCK)
        """Blocks per engine: those in computation, and the next ones."""
        self._asking: Asking | None = None
        self._begun = False
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True, name="engines")
        self._thread.start()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Wait until the fewest engines run.

        Raises:
            UserError: vLLM cannot serve the model.
        """
        self._result(self._start())

    async def _start(self) -> None:
        self._begin()
        await self._supervisor.started()

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._supervisor.start()
            self._supervisor.grow()

    def _rebuilt(self, error: BaseException | None) -> None:
        """An engine has joined, or replaces a lost one."""
        if error is None and self._asking is not None:
            self._asking.send()

    def answers(self, requests: Sequence[Request], policy: Policy | None = None) -> Iterator[list[Answer]]:
        """The answers, in groups, in the order in which they finish; the same from any number of engines.

        Args:
            policy: the adapter to answer with; None: the base.

        Raises:
            UserError: engines were lost too often, or could not answer.
        """
        import ray

        served = ("base", []) if policy is None else (policy.digest, [ray.put(policy)])
        firsts = range(0, len(requests), REQUESTS_PER_BLOCK)
        blocks = [request_table(requests[first : first + REQUESTS_PER_BLOCK]) for first in firsts]
        asking = Asking(self._supervisor, blocks, served, self._at_once)
        try:
            while (table := self._result(self._next(asking))) is not None:
                yield answers_of(table)
        finally:
            self._loop.call_soon_threadsafe(asking.stop)

    async def _next(self, asking: Asking) -> Any:
        self._begin()
        self._asking = asking
        try:
            return await asking.next()
        except Exception as error:
            raise _refusal(error) from error

    def close(self) -> None:
        """End the engines; those that answer first remove their files (adapters in /dev/shm)."""
        if self._loop.is_closed():
            return
        self._result(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        import ray

        if ray.is_initialized():  # else the engines have ended; a call would start another Ray
            await self._supervisor.stop()
            end(self._running)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _result(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns, which runs in the engines' loop; it is cancelled if the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()


async def _nothing(slot: int, engine: Any) -> None:
    """A new engine loads its policy with its first block."""


def _refusal(error: Exception) -> UserError:
    """Why there is no answer, in a line."""
    import ray

    cause = error.__cause__ if isinstance(error.__cause__, ray.exceptions.RayError) else error
    if isinstance(cause, ray.exceptions.OutOfMemoryError):
        return out_of_memory("evaluate", cause)
    if cause is not error:  # of a lost engine
        return UserError(f"evaluate: {error}; answers so far are kept. {reason(cause)}")
    own = getattr(error, "cause", None) or error
    if isinstance(own, UserError):
        return UserError(str(own))
    return UserError(f"evaluate: an engine cannot answer ({reason(own)})")
