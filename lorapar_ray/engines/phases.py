"""Phases of a process's start: a log line and the seconds of each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Seconds by phase, in order."""

    def __init__(self, who: str) -> None:
        """`who`: how the log calls the process."""
        self._who = who
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block; its beginning and its end are lines of the log (`--verbose` shows them)."""
        print(f"lorapar: {self._who}: {name}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        print(f"lorapar: {self._who}: {name}: {self.seconds[name]:.1f} s", flush=True)
