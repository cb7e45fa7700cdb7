"""Stage `evaluate`: accuracy of the base and of each trained adapter on the test rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from lorapar_ray.config import Config, EvaluateConfig
from lorapar_ray.config.marks import Setting
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.task_inputs import files_read
from lorapar_ray.processes import Processes
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Settings, Stage, model_files, settings_of


def run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Answer and count."""
    from lorapar_ray.evaluation.job import evaluate_stage

    return evaluate_stage(config, run)


def settings(config: Config) -> Settings:
    """Its own, with the models that `models: null` stands for."""
    return settings_of(config, "model", "data", "evaluate") | {"evaluate.models": Setting(config.evaluated, False)}


def reads(config: Config) -> Iterator[str]:
    """The student, data and task files, and what these name."""
    yield from model_files(config.model.path)
    yield from files_read(config.evaluate)


def processes(config: Config) -> Iterator[Processes]:
    """The engines that answer."""
    evaluate = config.evaluate
    yield Processes("engines", "engine", evaluate.engines, evaluate.resources, evaluate.max_engines)


def check(config: Config) -> None:
    """There is something to evaluate on, and what is named is there."""
    settings = config.evaluate
    if not config.data.test and not settings.tasks:
        raise UserError("data.test: no source to evaluate on; give at least one, or run the stages one by one")
    if settings.tasks:
        _require_tasks(settings.model_dump_json(exclude={"models"}))


@cache
def _require_tasks(settings: str) -> None:
    """Once for all runs of a grid: loading MMLU's 57 tasks takes a while."""
    from lorapar_ray.evaluation.tasks import catalogue_of

    catalogue_of(EvaluateConfig.model_validate_json(settings))


STAGE = Stage(
    name="evaluate",
    help="Accuracy of the base, stage 1 and stage 2 on the test rows and on tasks of lm-eval.",
    needs=lambda config: (
        "label",
        *dict.fromkeys(name.partition("-")[0] for name in config.evaluated if name != "base"),
    ),
    settings=settings,
    run=run,
    outputs=("eval",),
    traces=("rejects/evaluate.parquet",),
    scratch=("work/evaluate",),
    reads=reads,
    processes=processes,
    check=check,
)
