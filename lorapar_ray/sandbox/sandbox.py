"""Runs many jobs on this machine's cores."""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lorapar_ray.sandbox.choice import choose
from lorapar_ray.sandbox.examination import Examination, Job, Verdict
from lorapar_ray.sandbox.layers import LayerName
from lorapar_ray.sandbox.limits import Limits


class Sandbox:
    """Runs model-written programs against their tests, in the strongest layer of this machine.

    Use as a context manager, or `close` it.
    """

    def __init__(self, layer: LayerName = "auto", limits: Limits | None = None, workers: int | None = None) -> None:
        """`workers` jobs run at a time; None: one per core of this process.

        Raises:
            UserError: this machine has no such layer (see `choose`).
        """
        self.limits = limits or Limits()
        self.layer = choose(layer)
        count = workers or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="sandbox")
        self._free: queue.SimpleQueue[Examination] = queue.SimpleQueue()
        self._all = [Examination(self.layer, self.limits) for _ in range(count)]
        for each in self._all:
            self._free.put(each)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, jobs: Sequence[Job]) -> list[Verdict]:
        """The verdict on each job, in order."""
        return list(self._pool.map(self._run, jobs))

    def close(self) -> None:
        """End every process."""
        for each in self._all:
            each.close()
        self._pool.shutdown()

    def _run(self, job: Job) -> Verdict:
        examination = self._free.get()
        try:
            return examination.run(job)
        finally:
            self._free.put(examination)
