"""SIGTERM, which Kubernetes, Slurm and `ray job stop` send first, ends a command as Ctrl-C does."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """This process got SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within this context SIGTERM raises `Terminated` in the main thread.

    To be entered after Ray has started: its own handler prints addresses of C++ code, and ends the process without
    cleaning up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual or signal.SIG_DFL)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Within this context this thread's calls of `signal.signal` change nothing.

    For importing users' code. Some libraries set handlers when they are set up: this would replace ours, and Python
    refuses it outside of the main thread, where Ray runs its async actors.
    """
    thread, usual = threading.current_thread(), signal.signal

    def kept(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if threading.current_thread() is thread else usual(number, handler)

    signal.signal = kept  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = usual


def status_of(interrupt: KeyboardInterrupt) -> int:
    """Print how an interrupted command resumes; returns its exit status, as a shell has it: 128 + the signal."""
    print("lorapar: interrupted; the same command continues where it stopped", file=sys.stderr)
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def _raise(*_: Any) -> None:
    raise Terminated
