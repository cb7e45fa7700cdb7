"""R vLLM engines behind Ray Data.

    requests ─► blocks ─► asking worker (Ray Data) ─► R engine actors
                  └───── the first ones, directly ─────────┘ │
    answers  ◄─────────────────────────────── as they are finished

Ray Data holds the queue and the backpressure: neither the driver nor the worker keeps more than some blocks in flight.
It takes two to three seconds to start its worker, so the first blocks, as many as the engines have at once, go to them
directly: the engines do not wait, and a short stream needs no worker. The engines outlive one stream of requests, since
each takes a minute to start; between two streams they change policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from typing import Any, cast

import pyarrow as pa

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.answering import AnsweringEngine
from lorapar_ray.engines.kept import end
from lorapar_ray.engines.policy import Policy
from lorapar_ray.engines.requests import ANSWER_SCHEMA, Answer, Request, answers_of, request_table
from lorapar_ray.errors import UserError
from lorapar_ray.text import reason
from lorapar_ray.workers import actor_ended

REQUESTS_PER_BLOCK = 16
RESTARTS = 3
"""Restarts of one engine before the evaluation stops: more mean a broken setup."""
OBJECT_STORE_BYTES = 256 * 2**20
LEAVE_LIMIT_S = 5.0
"""Time for engines to end by themselves."""
FAILURE, LOST = "failure", "lost"
"""Beginnings of the key of a row that holds an error instead of answers; `LOST`: an engine's death."""


class EngineLost(UserError):
    """An engine died, and Ray restarts it no more."""


class Engines:
    """Use as a context manager, or `close` them."""

    def __init__(
        self,
        model: str,
        settings: EngineConfig,
        resources: Resources,
        count: int = 1,
        *,
        seed: int = 0,
        where: str = "evaluate.engine",
        trust_remote_code: bool = False,
        sync: str = "merged",
        max_lora_rank: int | None = None,
        running: Sequence[Any] = (),
    ) -> None:
        """Create the actors; their engines start with `start`, or with the first request.

        Args:
            model: what vLLM loads: a directory or a hub name.
            sync: `merged` or `adapter` (see `start_engine`).
            running: actors of such engines, which Ray does not restart; a lost one is replaced here.
        """
        self._at_once = -(-2 * settings.max_num_seqs // REQUESTS_PER_BLOCK)
        """Blocks per engine: those in computation, and the next ones."""
        self._new = partial(
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
            restarts=RESTARTS,
        )
        self._running = list(running[:count])
        self._actors = [*self._running, *(self._new() for _ in range(count - len(self._running)))]

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Wait until every engine runs.

        Raises:
            UserError: vLLM cannot serve the model.
        """
        import ray

        try:
            ray.get([actor.start.remote() for actor in self._actors])
        except ray.exceptions.RayError as error:
            if not self._running or not actor_ended(error):
                raise
            self._replace_running()
            ray.get([actor.start.remote() for actor in self._actors])

    def _replace_running(self) -> None:
        """Put new actors in the place of those that were running, one of which is lost."""
        lost, self._running = self._running, []
        end(lost)
        self._actors = [*self._actors[len(lost) :], *(self._new() for _ in lost)]

    def answers(self, requests: Sequence[Request], policy: Policy | None = None) -> Iterator[list[Answer]]:
        """The answers, in groups, in the order in which they finish.

        Args:
            policy: the adapter to answer with; None: the base.

        Raises:
            UserError: an engine died more than `RESTARTS` times, or could not answer.
        """
        left = {request.key: request for request in requests}
        try:
            for found in self._answers(requests, policy):
                for answer in found:
                    left.pop(answer.key, None)
                yield found
        except EngineLost:
            if not self._running:
                raise
            self._replace_running()
            yield from self._answers(list(left.values()), policy)

    def _answers(self, requests: Sequence[Request], policy: Policy | None) -> Iterator[list[Answer]]:
        """As `answers`, without replacing an engine."""
        import ray

        served = ("base", []) if policy is None else (policy.digest, [ray.put(policy)])
        blocks = [
            request_table(requests[first : first + REQUESTS_PER_BLOCK])
            for first in range(0, len(requests), REQUESTS_PER_BLOCK)
        ]
        at_once = self._at_once * len(self._actors)
        engine = cycle(self._actors)
        first = [next(engine).answer.remote(block, *served) for block in blocks[:at_once]]
        later = iter(self._stream(blocks[at_once:], at_once, served))
        reader = ThreadPoolExecutor(1, thread_name_prefix="answers")
        try:
            coming = reader.submit(next, later, None)  # starts Ray Data's worker
            while first:
                [done], first = ray.wait(first)
                yield _answers(_result(done))
            while (table := coming.result()) is not None:
                coming = reader.submit(next, later, None)
                yield _answers(table)
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def _stream(self, blocks: list[pa.Table], at_once: int, served: tuple[str, Sequence[Any]]) -> Iterable[Any]:
        """The `answer_table` of each block, through Ray Data."""
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        if not blocks:
            return ()
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False
        # without limits Ray Data counts CPUs that the engines hold as its own and waits for them forever
        limits = {"cpu": 1, "object_store_memory": OBJECT_STORE_BYTES}
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(**limits)
        # `from_arrow` requests a CPU to read its tables, and the engines may hold all CPUs
        asked = ray.data.from_blocks(blocks).map_batches(
            Asker,
            fn_constructor_args=(self._actors, *served),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(
                size=1, max_concurrent_calls_per_actor=at_once, max_tasks_in_flight_per_actor=2 * at_once
            ),
            num_cpus=0,
        )
        return cast(Iterable[Any], asked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))

    def close(self) -> None:
        """End the engines; those that answer first remove their files (adapters in /dev/shm)."""
        import ray

        if not ray.is_initialized():  # the engine has already ended; a call would start another
            return
        leaving = [actor.leave.remote() for actor in self._actors]
        ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_LIMIT_S, fetch_local=False)
        for actor in self._actors:
            ray.kill(actor)


class Asker:
    """Ray Data's worker: gives each block to the engine with the fewest blocks."""

    def __init__(self, actors: Sequence[Any], digest: str, policy: Sequence[Any]) -> None:
        self._actors = actors
        self._served = digest, policy
        self._blocks = [0] * len(actors)

    async def __call__(self, block: pa.Table) -> Any:
        """Yields the `answer_table` of a `request_table`."""
        place = min(range(len(self._actors)), key=self._blocks.__getitem__)
        self._blocks[place] += 1
        try:
            yield await self._actors[place].answer.remote(block, *self._served)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            yield _failure(error)
        finally:
            self._blocks[place] -= 1


def _result(done: Any) -> pa.Table:
    import ray

    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:
        return _failure(error)


def _answers(table: pa.Table) -> list[Answer]:
    """The answers of an `answer_table`.

    Raises:
        EngineLost, UserError: it holds an error instead.
    """
    found = answers_of(table)
    for answer in found:
        if answer.key.startswith(LOST):
            raise EngineLost(answer.key.removeprefix(LOST))
        if answer.key.startswith(FAILURE):
            raise UserError(answer.key.removeprefix(FAILURE))
    return found


def _failure(error: Exception) -> pa.Table:
    """An error as a row: Ray Data would wrap an exception several times."""
    if actor_ended(error):
        key = f"{LOST}evaluate: an engine died {RESTARTS + 1} times; answers so far are kept. {reason(error)}"
    else:
        cause = getattr(error, "cause", None) or error
        why = str(cause) if isinstance(cause, UserError) else f"evaluate: an engine cannot answer ({reason(error)})"
        key = FAILURE + why
    return pa.Table.from_pylist([{"key": key, "tokens": [], "logprobs": [], "greedy": []}], schema=ANSWER_SCHEMA)
