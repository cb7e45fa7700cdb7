"""Stage `label`: the questions, and the System of each by the teachers' votes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.gpus import without_auto
from lorapar_ray.processes import Part, Processes, teachers
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Stage, model_files, settings_of
from lorapar_ray.user_modules import user_modules


def run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Read the questions and label them."""
    from lorapar_ray.datasets.prepare import prepare
    from lorapar_ray.labeling.job import label

    return prepare(config, run) | label(config, run)


def reads(config: Config) -> Iterator[str]:
    """Local data files, hub data sets and hosted teachers that are local folders, modules of Python teachers."""
    for source in (*config.data.train, *config.data.test):
        place = getattr(source, "path", None) or (source.name if source.reader == "hub" else None)
        if place is not None:
            yield place
    for each in config.label.teachers:
        if each.kind == "serve" and config.label.voted:
            yield from model_files(each.model)
        elif each.kind == "python" and config.label.voted:
            yield from user_modules(each.model)


def processes(config: Config) -> Iterator[Part]:
    """Teachers, and the workers that ask them."""
    label = config.label
    if label.voted:
        yield from teachers(label.teachers)
        yield Processes("workers", "asking worker", label.workers, without_auto(label.resources))
        yield f"{label.workers * label.concurrency} questions in flight"


OF_VOTES = (
    "teachers",
    "student_name",
    "examples",
    "prompt",
    "calibration",
    "calibration_rows",
    "weights",
    "sequential",
)
COSTS = ("cost_per_million_tokens", "cost_per_hour")


def unused(config: Config) -> Iterator[str]:
    """Settings of votes where none are cast, the sample of another calibration, and prices that choose no order."""
    label = config.label
    if not label.voted:
        yield from (f"label.{name}" for name in OF_VOTES)
        return
    if label.calibration != "batch":
        yield "label.calibration_rows"
    if not label.sequential:
        yield from (f"label.teachers.{index}.{cost}" for index in range(len(label.teachers)) for cost in COSTS)


STAGE = Stage(
    name="label",
    help="Let the teachers vote which System each training question belongs to.",
    needs=lambda _: (),
    settings=lambda config: settings_of(config, "data", "label"),
    unused=unused,
    run=run,
    outputs=("data", "labels", "metrics/labels.json"),
    passed_on=("data", "labels"),
    traces=("rejects/prepare.parquet", "rejects/label.parquet"),
    scratch=("work/label",),
    reads=reads,
    processes=processes,
    lowered_by="label.teachers",
    uses_ray=lambda config: config.label.voted,
)
