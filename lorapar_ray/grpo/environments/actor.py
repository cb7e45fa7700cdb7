"""Environment workers of a run: Ray actors in which episodes run, and the class that assigns groups to them.

An episode calls its engine directly; records go into the object store, like those of plain groups. The coordinator's
`EnginePool` chooses a group's engine, and moves the group if the engine is lost.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.engines.record import GroupHead, GroupRecord
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.environments.episodes import EpisodeGroup, RolloutFunction
from lorapar_ray.grpo.environments.registry import get_environment
from lorapar_ray.grpo.environments.trajectory import Limits, as_record
from lorapar_ray.models import architecture, resolve_model
from lorapar_ray.text import one_line
from lorapar_ray.workers import actor_ended, ray_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorapar_ray.grpo.engine_pool import EnginePool

CRASHES = 3
"""Number of workers that a group may crash before its samples count as lost."""
TICK_S = 1.0
STRANDED = GroupHead(0, (), (), (), open=(0,))
"""Returned instead of a group's head: its engine is lost, and the group waits for another."""


class EnvironmentActor:
    """Async Ray actor: plays episodes of many groups in one event loop."""

    def __init__(self, plan: dict[str, Any]) -> None:
        """`plan`: see `Coordinator`."""
        settings = GrpoConfig.model_validate(plan["settings"])
        assert settings.environment is not None
        self._rows: Sequence[dict[str, Any]] = plan["rows"]
        self._rollout: RolloutFunction | UserError
        try:
            self._rollout = get_environment(settings.environment)
        except UserError as error:  # raised by each call: an error of the constructor would only restart this process
            self._rollout = error
        model = resolve_model(plan["model"]), plan["trust_remote_code"]
        self._encoder = load_encoder(model[0], None, model[1])
        vocabulary = len(self._encoder.tokenizer)
        embeddings = getattr(architecture(*model).get_text_config(), "vocab_size", vocabulary)
        self._limits = Limits(
            settings.max_prompt_length,
            settings.max_completion_length,
            min(vocabulary, embeddings),  # a tokenizer may have tokens that the model has not
        )
        self._time_limit_s = settings.environment_time_limit_s
        self._groups: dict[str, tuple[EpisodeGroup, asyncio.Task[GroupRecord]]] = {}
        self._watched = False

    async def rollout(
        self, engine: Any, key: str, index: int, sampling: Mapping[str, Any]
    ) -> tuple[GroupRecord | None, GroupHead]:
        """Play a group of prompt `index` on `engine`, or continue it there; call with `num_returns=2`.

        Returns:
            its record and head; `STRANDED` if the engine is lost: the group waits for a call with another engine.

        Raises:
            UserError: the environment cannot be imported here.
        """
        if isinstance(self._rollout, UserError):
            raise self._rollout
        self._watch()
        if key not in self._groups:
            row = row_of(self._rows[index])
            group = EpisodeGroup(key, self._rollout, row, self._encoder, self._limits, sampling, self._time_limit_s)
            self._groups[key] = group, asyncio.create_task(group.play())
        group, playing = self._groups[key]
        group.move_to(engine)
        stranded = asyncio.create_task(group.stranded.wait())
        await asyncio.wait({playing, stranded}, return_when=asyncio.FIRST_COMPLETED)
        stranded.cancel()
        if not playing.done():
            return None, STRANDED
        self._groups.pop(key, None)
        record = playing.result()
        return record, record.head

    async def cancel(self, key: str) -> None:
        """End a group that is no longer needed."""
        if key in self._groups:
            self._groups.pop(key)[1].cancel()

    async def alive(self) -> None:
        """Returns once this process runs."""

    def _watch(self) -> None:
        """From the first call on, end this process if an episode blocks its event loop for longer than the time
        limit."""
        if not self._watched:
            self._watched = True
            end_if_held_up(asyncio.get_running_loop(), self._time_limit_s)


def end_if_held_up(loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
    """End this process if `loop` is blocked for `limit_s`: an episode waits without `await`."""
    seen = time.monotonic()

    def tick() -> None:
        nonlocal seen
        seen = time.monotonic()
        loop.call_later(TICK_S, tick)

    def look() -> None:
        while time.monotonic() - seen < limit_s + TICK_S:
            time.sleep(TICK_S)
        os._exit(1)

    tick()
    threading.Thread(target=look, daemon=True).start()


def row_of(question: Mapping[str, Any]) -> dict[str, Any]:
    """A question in the form that an environment gets: our fields (`prompt`, `answer`, `prompt_ids`, …), the data's
    other columns, and all of the data's columns again as `columns`."""
    own = json.loads(question["columns"]) if question.get("columns") else {}
    return {**own, **question, "columns": own}


class EnvironmentWorkers:
    """Assigns groups to `grpo.environment_workers` actors; used in one event loop."""

    def __init__(self, plan: dict[str, Any], worker: type[Any] = EnvironmentActor) -> None:
        """Start the workers.

        Args:
            plan: see `Coordinator`.
            worker: the worker's class.
        """
        import ray

        settings = GrpoConfig.model_validate(plan["settings"])
        actor = ray.remote(worker).options(
            **ray_options(settings.environment_resources), max_restarts=-1, max_concurrency=10_000
        )
        self._actors = [actor.remote({**plan, "judge": None}) for _ in range(settings.environment_workers)]
        self._load = [0] * len(self._actors)

    async def play(
        self,
        engines: EnginePool,
        key: str,
        index: int,
        prompt_ids: Sequence[int] | NDArray[Any],
        sampling: Mapping[str, Any],
    ) -> tuple[Any, GroupHead]:
        """A reference to a group's record, and its head; every sample is lost if the group crashes `CRASHES` workers.

        Args:
            sampling: vLLM's parameters of a turn; `n` is the number of samples, `seed` the group's seed.

        Raises:
            UserError: the environment cannot be imported in the worker's process.
        """
        import ray

        for crash in range(CRASHES):
            place = self._load.index(min(self._load))
            worker, own = self._actors[place], f"{key}/{crash}"
            self._load[place] += 1
            try:
                ask = worker.rollout.options(num_returns=2).remote
                return await engines.episodes(prompt_ids, partial(_asked, ask, own, index, sampling))
            except asyncio.CancelledError:
                worker.cancel.remote(own)
                raise
            except ray.exceptions.RayError as error:
                if not actor_ended(error):
                    raise
                told = f"its worker died, {CRASHES} times: {one_line(str(error), 200)}"
                with suppress(ray.exceptions.RayError):  # calls fail until Ray has restarted it
                    await worker.alive.options(max_task_retries=-1).remote()
            finally:
                self._load[place] -= 1
        nothing = as_record([], [told] * sampling["n"])
        return ray.put(nothing), nothing.head

    def stop(self) -> None:
        """End the workers."""
        import ray

        for actor in self._actors:
            ray.kill(actor)


def _asked(ask: Any, key: str, index: int, sampling: Mapping[str, Any], engine: Any) -> Any:
    return ask(engine, key, index, sampling)
