"""Runs work outside the main thread, for libraries that replace signal handlers there or never return."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def in_a_thread(work: Callable[[], T], *, name: str, timeout_s: float | None = None) -> T:
    """Run `work` in a thread; returns or raises as it does. The main thread waits interruptibly.

    Raises:
        TimeoutError: it takes longer than `timeout_s`; it may continue in its thread, which does not keep the process
            alive.
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


@contextmanager
def meanwhile(look: Callable[[], object], every_s: float) -> Iterator[None]:
    """Call `look` in a thread every `every_s` seconds while the block runs."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def stop_this_command() -> None:
    """End this command from one of its threads: like Ctrl-C, or by SIGTERM if Ctrl-C is ignored.

    A shell script starts its background commands with SIGINT ignored. The signal goes to the main thread itself: it
    may be waiting for a lock, which only a signal of its own interrupts.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.pthread_kill(_main_thread(), signal.SIGTERM if ignored else signal.SIGINT)


def _main_thread() -> int:
    main = threading.main_thread().ident
    assert main is not None  # it has started
    return main
