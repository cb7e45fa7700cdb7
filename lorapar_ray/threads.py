"""Runs work outside the main thread, for libraries that replace signal handlers there or never return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_a_thread(work: Callable[[], T], *, name: str, timeout_s: float | None = None) -> T:
    """What `work` returns or raises; the main thread waits for it interruptibly.

    Raises:
        TimeoutError: it takes longer than `timeout_s`; it may go on in its thread, which does not keep the process.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    try:
        return outcome.result(timeout=timeout_s)
    except TimeoutError as error:
        if outcome.done():
            raise
        raise TimeoutError(f"{name}: not done within {timeout_s:g} s") from error
