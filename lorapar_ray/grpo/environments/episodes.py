"""A group of episodes in flight: one for each sample, on the group's current engine."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lorapar_ray.datasets.chat import Encoder
from lorapar_ray.engines.record import GroupRecord
from lorapar_ray.grpo.environments.trajectory import Limits, Trajectory, as_record
from lorapar_ray.grpo.environments.turns import TurnEngine
from lorapar_ray.text import one_line
from lorapar_ray.waiting import awaited, foreign

RolloutFunction = Callable[[TurnEngine, dict[str, Any]], Awaitable[Trajectory]]
LONGEST_TEXT = 300
GRACE_S = 1.0
"""Time in which a cancelled episode may end."""
LEFT: set[asyncio.Task[Any]] = set()
"""Cancelled episodes that have not ended: the event loop alone does not keep a task alive."""


class EpisodeGroup:
    """The episodes of one prompt; used in one event loop."""

    def __init__(
        self,
        key: str,
        rollout: RolloutFunction,
        row: Mapping[str, Any],
        encoder: Encoder,
        limits: Limits,
        sampling: Mapping[str, Any],
        time_limit_s: float,
    ) -> None:
        """Store the arguments; the episodes begin with `play`.

        Args:
            key: of the group, unique among groups in flight.
            rollout: the environment.
            row: the question, given to each episode as a copy.
            sampling: vLLM's parameters of one turn; `n` is the number of episodes, `seed` the group's seed.
            time_limit_s: longest time of an episode between two calls of the engine.
        """
        self._key, self._rollout, self._row = key, rollout, row
        self._encoder, self._limits, self._sampling = encoder, limits, dict(sampling)
        self._count, self._seed = self._sampling.pop("n"), self._sampling.pop("seed")
        self._time_limit_s = time_limit_s
        self._engine: Any = None
        self._moved = asyncio.Event()
        self.stranded = asyncio.Event()
        """Set while the engine is lost and the group has no other."""

    def move_to(self, engine: Any) -> None:
        """Continue with this engine's handle; it repeats the turns that wait for another engine."""
        self._engine = engine
        self.stranded.clear()
        self._moved.set()
        self._moved = asyncio.Event()

    async def play(self) -> GroupRecord:
        """The record of all finished episodes; its head gives the reasons of the others."""
        found = await asyncio.gather(*(self._episode(number) for number in range(self._count)))
        trajectories = [each for each in found if isinstance(each, Trajectory)]
        return as_record(trajectories, [each for each in found if isinstance(each, str)])

    async def _episode(self, number: int) -> Trajectory | str:
        """One sample, or the reason of its loss; an episode that runs on after its cancellation is left behind."""
        loop, turns, waiting, left = asyncio.get_running_loop(), 0, 0, False
        scope = asyncio.timeout(self._time_limit_s)

        async def sample(ids: list[int], options: dict[str, Any]) -> GroupRecord:
            nonlocal turns, waiting
            if left or scope.expired():
                await loop.create_future()  # never done: the episode might catch an error, and ask again without end
            turns, waiting = turns + 1, waiting + 1
            scope.reschedule(None)  # the engine's time does not count
            stop = [*self._sampling.get("stop", ()), *options["stop"]]
            seed = zlib.crc32(f"{self._seed}/{number}/{turns}".encode())
            asked = {**self._sampling, **options, "stop": stop, "n": 1, "seed": seed}
            try:
                return await self._turn(f"{self._key}/{number}/{turns}", ids, asked)
            finally:
                waiting -= 1
                if not (waiting or left or scope.expired()):
                    scope.reschedule(loop.time() + self._time_limit_s)

        playing = loop.create_task(self._outcome(TurnEngine(sample, self._encoder, self._limits)))
        try:
            async with scope:
                await asyncio.wait({playing})
            return "CancelledError: it cancels its own task" if playing.cancelled() else playing.result()
        except TimeoutError:
            playing.cancel()
            await asyncio.wait({playing}, timeout=GRACE_S)
            if playing.done() and not playing.cancelled():
                found = playing.result()
                if isinstance(found, Trajectory):  # what it had when it was cancelled
                    return found
            return f"TimeoutError: it takes longer than grpo.environment_time_limit_s ({self._time_limit_s:g})"
        finally:
            left = True
            if not playing.done():
                playing.cancel()
                LEFT.add(playing)
                playing.add_done_callback(LEFT.discard)

    async def _outcome(self, engine: TurnEngine) -> Trajectory | str:
        """An episode's trajectory, or its error; a task of its own, which may catch its cancellation."""
        try:
            return engine.complete(await foreign(self._rollout(engine, dict(self._row))))
        except (Exception, SystemExit) as error:  # an environment may raise anything
            return _told(error)

    async def _turn(self, key: str, ids: Sequence[int], sampling: Mapping[str, Any]) -> GroupRecord:
        """One turn, sampled by the current engine; if that is lost, by the next."""
        import ray

        while True:
            engine, moved = self._engine, self._moved
            record, _ = engine.rollout.options(num_returns=2).remote(list(ids), sampling, key, None)
            answer, moving = asyncio.ensure_future(awaited(record)), asyncio.ensure_future(moved.wait())
            try:
                await asyncio.wait({answer, moving}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    continue
                found: GroupRecord = answer.result()
                return found
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError):
                if self._engine is engine:
                    self.stranded.set()
                    await moved.wait()
            except asyncio.CancelledError:
                with suppress(Exception):
                    engine.give_back.remote(key)  # no longer needed
                raise
            finally:
                answer.cancel()
                moving.cancel()


def _told(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}", LONGEST_TEXT)
