"""What the leading learner writes of each step: metrics, a few completions, and the trackers' curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.grpo.samples import Batch
from lorapar_ray.trackers import Curves
from lorapar_ray.tracking import append_line, keep_lines_until


class Journal:
    """`metrics/grpo.jsonl` and `metrics/samples.jsonl` of a run."""

    def __init__(self, metrics: Path, samples: Path, report_to: Sequence[str], run: str) -> None:
        self._metrics, self._samples = metrics, samples
        self._curves = Curves(report_to, run, metrics.with_name("tensorboard") / "grpo")

    def begin(self, step: int) -> None:
        """Go on after `step`: the lines of later steps, which will be done again, are dropped."""
        keep_lines_until(self._metrics, step)
        keep_lines_until(self._samples, step)

    def write(
        self, step: int, batch: Batch, metrics: Mapping[str, float], learning: float, waited: float, whole: float
    ) -> None:
        """Add a step of `whole` seconds, of which the learner computed for `learning` and waited for `waited`."""
        line: dict[str, Any] = {"step": step, "policy_version": step, **batch.metrics, **metrics}
        line |= {"seconds/learn": learning, "seconds/wait": waited, "seconds": whole, "prompts": batch.prompts}
        line |= {"learner_tokens_per_s": batch.tokens / learning, "idle/learner": waited / whole}
        append_line(self._metrics, line)
        for example in batch.examples:
            append_line(self._samples, {"step": step, **example})
        self._curves.write(line, step)
