"""Processes that a test looks for and kills; each may end at any moment."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from random import Random
from typing import Any

import psutil

from tests.chaos import Recovery
from tests.waiting import LIMIT_S, beside, wait_until


def title(process: psutil.Process) -> str:
    """A process's command line, or its title; empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # also of a zombie
        return ""


def runs(process: psutil.Process) -> bool:
    """A zombie does not: it has ended, and whoever has taken it over has not looked yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def below(pattern: str, root: int | None = None) -> list[psutil.Process]:
    """The live descendants of a process, by default of this one, whose title has a match of the pattern."""
    found = psutil.Process(root).children(recursive=True)
    return [each for each in found if re.search(pattern, title(each)) and runs(each)]


def engines_of(root: int, replica: str) -> list[psutil.Process]:
    """vLLM's own processes below a Serve replica whose title begins so."""
    return [engine for parent in below(f"^{replica}", root) for engine in below("EngineCore", parent.pid)]


@contextmanager
def a_worker_dies(
    stage: str, after: int, done: Callable[[], Sequence[Any]], chance: Random, recovery: Recovery
) -> Iterator[list[Any]]:
    """`kill -9` to one of Ray Train's workers of this process's Ray while the block runs, once `after` things are done.

    Yields a list that gets all that was done before the kill. The block's work has to do more after it.
    """
    before: list[Any] = []

    def kill_one() -> None:
        wait_until(f"{stage}: {after} are done", lambda: len(done()) >= after, LIMIT_S, every_s=0.02)
        worker = chance.choice(below("RayTrainWorker"))
        before.extend(done())
        worker.kill()
        with recovery(stage, "worker"):
            wait_until(f"{stage} goes on", lambda: len(done()) > len(before), LIMIT_S)

    with beside(kill_one):
        yield before


def kill_all(pattern: str) -> None:
    """`kill -9` to every descendant of this process whose title has a match of the pattern."""
    for process in below(pattern):
        with suppress(psutil.NoSuchProcess):
            process.kill()
