"""A running run's metrics for Prometheus, through Ray's metrics; `cluster/grafana/lorapar.json` plots them.

Ray puts `ray_` before these names. Each process sets its own; no service needs to be started.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

PROGRESS_METRICS = ("lorapar_done", "lorapar_total")
"""Gauges of every stage that works on Ray, by `run` and `work` (the name of its progress bar)."""
FIGURE_METRICS = ("lorapar_sft", "lorapar_grpo")
"""Gauges of the training stages, by `run` and `figure`: the numbers of a step, as in `metrics/<stage>.jsonl`."""


def report_progress(run: str, work: str, total: int) -> Callable[[int], None]:
    """A function that takes the count so far; without Ray in this process it does nothing."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return lambda done: None
    from ray.util.metrics import Gauge

    words = ("Units of work that are done", "Units of work in all")
    done_gauge, total_gauge = (
        Gauge(name, text, tag_keys=("run", "work")) for name, text in zip(PROGRESS_METRICS, words, strict=True)
    )
    tags = _tags(run=run, work=work)
    total_gauge.set(total, tags)
    return lambda done: done_gauge.set(done, tags)


def report_figures(run: str, stage: str) -> Callable[[Mapping[str, float]], None]:
    """A function that takes a step's figures."""
    from ray.util.metrics import Gauge

    gauge = Gauge(f"lorapar_{stage}", f"Figures of the last step of {stage}", tag_keys=("run", "figure"))

    def write(figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            gauge.set(value, _tags(run=run, figure=name))

    return write


def _tags(**values: str) -> dict[str, str]:
    """Values of tags, which Ray wants in ASCII."""
    return {key: each.replace("×", "x").encode("ascii", "backslashreplace").decode() for key, each in values.items()}
