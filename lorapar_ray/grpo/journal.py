"""The log of rank 0 for each step: metrics, a few completions, and the trackers' curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.engines.record import read_record
from lorapar_ray.grpo.batches import Share
from lorapar_ray.trackers import Curves
from lorapar_ray.tracking import append_line, keep_lines_until


class Journal:
    """`metrics/grpo.jsonl` and `metrics/samples.jsonl` of a run."""

    def __init__(
        self, metrics: Path, samples: Path, report_to: Sequence[str], run: str, text: Callable[[list[int], bool], str]
    ) -> None:
        """`text` decodes a completion, up to its first end or (False) the whole."""
        self._metrics, self._samples, self._text = metrics, samples, text
        self._curves = Curves(report_to, run, metrics.with_name("tensorboard") / "grpo", "grpo", metrics)

    def begin(self, step: int) -> None:
        """Resume after `step`: drop the lines of later steps, which will be repeated."""
        keep_lines_until(self._metrics, step)
        keep_lines_until(self._samples, step)

    def write(
        self,
        step: int,
        share: Share,
        metrics: Mapping[str, float],
        *,
        learning: float,
        waited: float,
        proofs: float,
        whole: float,
    ) -> None:
        """Add a step of `whole` seconds.

        Args:
            learning: seconds for which the learner computed.
            waited: seconds for which it waited for the batch.
            proofs: seconds for which it waited until the engines' policies were verified.
        """
        line: dict[str, Any] = {"step": step, "policy_version": step, **share.metrics, **metrics}
        line |= {"seconds/learn": learning, "seconds/wait": waited, "seconds": whole, "prompts": share.prompts}
        line |= {"learner_tokens_per_s": share.tokens / learning, "idle/learner": (waited + proofs) / whole}
        append_line(self._metrics, line)
        for example in share.examples:
            record = read_record(example.record)
            if record is not None:
                text = self._text(record.completions()[example.completion][0].tolist(), record.sampled is None)
                told = {"prompt": example.prompt, "completion": text, "answer": example.answer}
                append_line(self._samples, {"step": step, **told, "reward": example.reward})
        self._curves.write(line, step)
