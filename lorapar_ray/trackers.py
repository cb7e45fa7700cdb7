"""Sends a stage's curves to trackers while it runs: always Ray's metrics; TensorBoard, W&B and MLflow by config."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.run_metrics import report_figures
from lorapar_ray.tracking import PROJECT

Write = Callable[[Mapping[str, float], int], None]


class Curves:
    """Writes a step's figures to every tracker of the run."""

    def __init__(self, names: Sequence[str], run: str, folder: Path, stage: str = "grpo") -> None:
        """Take the trackers' names (`tensorboard`, `wandb`, `mlflow`), the run's name and TensorBoard's folder."""
        makers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
        self._writers: list[Write] = [_ray_metrics(run, stage), *(makers[name](run, folder) for name in names)]

    def write(self, line: Mapping[str, Any], step: int) -> None:
        """Write every number of `line`."""
        figures = {key: float(value) for key, value in line.items() if isinstance(value, int | float)}
        for writer in self._writers:
            writer(figures, step)


def _ray_metrics(run: str, stage: str) -> Write:
    report = report_figures(run, stage)
    return lambda figures, step: report(figures)


def _tensorboard(run: str, folder: Path) -> Write:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(run: str, folder: Path) -> Write:
    import wandb

    session = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=run, id=run, resume="allow")
    return lambda figures, step: session.log(dict(figures), step=step)


def _mlflow(run: str, folder: Path) -> Write:
    import mlflow

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    mlflow.start_run(run_name=run)
    return lambda figures, step: mlflow.log_metrics(
        {name.replace("/", "."): value for name, value in figures.items()}, step
    )
