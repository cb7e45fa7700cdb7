"""Peak memory of a piece of work in this process."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]


@dataclass
class Memory:
    """Bytes before a block, and the most during it."""

    before: int
    peak: int

    @property
    def added(self) -> int:
        return self.peak - self.before


@contextmanager
def private_memory() -> Iterator[Memory]:
    """Resident memory not backed by files, on Linux; memory freed by earlier work is returned to the system first."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, done = psutil.Process(), threading.Event()

    def now() -> int:
        memory = process.memory_info()
        held: int = memory.rss - memory.shared
        return held

    memory = Memory(now(), now())

    def watch() -> None:
        while not done.wait(0.01):
            memory.peak = max(memory.peak, now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()


@contextmanager
def device_memory() -> Iterator[Memory]:
    """Memory allocated on the current CUDA device."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    memory = Memory(torch.cuda.memory_allocated(), 0)
    yield memory
    torch.cuda.synchronize()
    memory.peak = torch.cuda.max_memory_allocated()
