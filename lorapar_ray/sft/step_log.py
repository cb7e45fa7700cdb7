"""A line of figures per optimiser step, written a step later, so that no step waits for the device.

Reading a number from a GPU waits for all earlier kernels. So a step's numbers are copied to host memory asynchronously,
and read after the next step has been launched. So is whether the step was skipped because its gradient was not finite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.tracking import append_line, memory_mib

Write = Callable[[Mapping[str, Any], int], None]
Arriving = Callable[[], tuple[list[float], float]]
"""The figures, and the time (`time.monotonic`) when they were computed."""


class StepLog:
    """The metrics file of a run, and its trackers."""

    def __init__(
        self,
        file: Path | None,
        curves: Write | None,
        active_share: float,
        *,
        nonfinite_limit: int = 3,
        name: str = "sft",
        rate: str = "sft.learning_rate",
    ) -> None:
        """Take a file that gets a JSON line a step, and what else gets it; None: not on this rank.

        Args:
            active_share: active elements over all elements, which every line repeats.
            nonfinite_limit: after this many skipped steps in a row there is a `failure`.
            name, rate: of the job, and of the setting of its learning rate, for that message.
        """
        self._file, self._curves, self._share = file, curves, active_share
        self._limit, self._name, self._rate = nonfinite_limit, name, rate
        self._skipped = 0
        """Steps skipped in a row."""
        self.failure: str | None = None
        """Why training cannot go on; the same on every rank after the same step, since all have the same norms."""
        self._waiting: tuple[int, dict[str, float], int, Arriving] | None = None
        self._clock = time.monotonic()

    def put(self, step: int, loss: Tensor, norm: Tensor, rate: float, tokens: int) -> None:
        """Take a step's figures, of which loss and norm are still being computed; writes those of the step before."""
        arriving = _on_their_way(torch.stack([loss.float(), norm.to(loss.device).float()]))
        self.flush()
        self._waiting = step, {"learning_rate": rate}, tokens, arriving

    def flush(self) -> None:
        """Write the pending figures; of a skipped step, those that are finite."""
        if self._waiting is None:
            return
        step, known, tokens, arriving = self._waiting
        self._waiting = None
        (loss, norm), ended = arriving()
        seconds, self._clock = ended - self._clock, ended
        line = {
            "step": step,
            "loss": loss,
            **known,
            "grad_norm": norm,
            "updates_skipped": float(not isfinite(norm)),
            "tokens_per_s": tokens / seconds,
            "active_share": self._share,
            "memory_mib": memory_mib(),
            "seconds": seconds,
        }
        line = {name: value for name, value in line.items() if isfinite(value)}
        if self._file is not None:
            append_line(self._file, line)
        if self._curves is not None:
            self._curves({f"train/{name}": value for name, value in line.items() if name != "step"}, step)
        self._skipped = 0 if isfinite(norm) else self._skipped + 1
        if self._skipped == self._limit:
            self.failure = (
                f"{self._name}: the gradient was not finite in {self._skipped} steps in a row (step {step}: "
                f"loss {loss:g}, gradient norm {norm:g}); lower {self._rate}, set model.dtype: float32, or "
                "check the base's weights"
            )

    def validated(self, step: int, loss: float) -> None:
        """Write a validation's loss; its time does not count for a step."""
        self.flush()
        if self._file is not None:
            append_line(self._file.with_name(f"{self._file.stem}_validation.jsonl"), {"step": step, "loss": loss})
        if self._curves is not None:
            self._curves({"eval/loss": loss}, step)
        self.leave_out()

    def leave_out(self) -> None:
        """Do not count the time since the last line for a step."""
        self._clock = time.monotonic()


def _on_their_way(figures: Tensor) -> Arriving:
    """Send figures to host memory; the function returned waits for them, and says when they were computed."""
    if figures.device.type != "cuda":
        computed: list[float] = figures.tolist()
        now = time.monotonic()
        return lambda: (computed, now)
    there = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    there.copy_(figures, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> tuple[list[float], float]:
        arrived.synchronize()
        return there.tolist(), time.monotonic()

    return read
