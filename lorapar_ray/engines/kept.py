"""Engines that stay for a command's next stage, if that asks for the same ones.

An engine takes from some seconds to a minute to start. Stage 2's coordinator would end its engines with itself, so the
driver creates those that are to stay, and hands them to the coordinator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any


class KeptEngines:
    """The engines that one stage leaves to the next."""

    def __init__(self, stages: Sequence[str]) -> None:
        """`stages`: those that the command runs, in order."""
        self._next = dict(pairwise(stages))
        self._engines: list[Any] = []

    def leads_to(self, stage: str, following: str) -> bool:
        """Whether `following` comes right after `stage`."""
        return self._next.get(stage) == following

    def keep(self, engines: Sequence[Any]) -> None:
        """Let the next stage have these actors' handles; an engine may be dead by then."""
        self._engines += engines

    def take(self) -> list[Any]:
        """The kept engines, which are the caller's from now on."""
        taken, self._engines = self._engines, []
        return taken


_kept = KeptEngines(())


def kept_engines() -> KeptEngines:
    """Those of the command that this process runs."""
    return _kept


@contextmanager
def keeping_engines(stages: Sequence[str]) -> Iterator[None]:
    """Let engines stay between the stages that the block runs; at its end those that no stage took are ended."""
    global _kept
    before, _kept = _kept, KeptEngines(stages)
    try:
        yield
    finally:
        left, _kept = _kept.take(), before
        end(left)


def end(engines: Sequence[Any]) -> None:
    """End engines that nothing uses."""
    import ray

    for engine in engines if ray.is_initialized() else ():
        ray.kill(engine)


class HandedEngines:
    """Creates the engine of a place: the driver's the first time, then others. Used in the coordinator's process."""

    def __init__(self, engines: Mapping[int, Any], start: Callable[[int], Any]) -> None:
        """Take the driver's engines by place, and what starts another."""
        self._engines = dict(engines)
        self._start = start

    def __call__(self, slot: int) -> Any:
        import ray

        engine = self._engines.pop(slot, None)
        if engine is not None and not ray.get_runtime_context().was_current_actor_reconstructed:
            return engine
        if engine is not None:  # it may still sample for the coordinator that died
            ray.kill(engine)
        return self._start(slot)
