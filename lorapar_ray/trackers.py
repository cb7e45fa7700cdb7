"""Sends a stage's curves to trackers while it runs: always Ray's metrics; TensorBoard, W&B and MLflow by config."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import read_object
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.run_metrics import report_figures
from lorapar_ray.text import reason
from lorapar_ray.tracking import PROJECT, notices_of

Write = Callable[[Mapping[str, float], int], None]
REST_S = 300.0
REST_TIMES = 20.0
"""A tracker that has failed is left alone for `REST_S`, and at least for so many times as long as the attempt took: a
client may try for minutes until it reports a dead server (MLflow: four), and the training waits for it."""


class Curves:
    """Writes a step's figures to every tracker of the run. A tracker that fails costs its curves, not the training."""

    def __init__(self, names: Sequence[str], run: str, folder: Path, stage: str, metrics: Path) -> None:
        """Begin with the trackers, or go on in the runs that they have of this stage.

        Args:
            names: `tensorboard`, `wandb`, `mlflow`.
            run: the run's name.
            folder: TensorBoard's.
            metrics: the stage's file of lines. Beside it, `<stage>.trackers.json` has the trackers' ids of this stage
                in this run directory; it is removed with the lines, so that a stage which begins anew has runs of its
                own. A tracker's failure goes to `notices_of` them.
        """
        tell = partial(_tell, notices_of(metrics))
        kept = metrics.with_suffix(".trackers.json")
        makers: dict[str, Callable[[], Write]] = {
            "tensorboard": lambda: _tensorboard(folder),
            "wandb": lambda: _wandb(run, kept),
            "mlflow": lambda: _mlflow(run, kept),
        }
        ours = _Tracker("Ray's metrics", lambda: _ray_metrics(run, stage), tell)
        self._trackers = [ours, *(_Tracker(name, makers[name], tell) for name in names)]

    def write(self, line: Mapping[str, Any], step: int) -> None:
        """Write every number of `line`."""
        figures = {key: float(value) for key, value in line.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.write(figures, step)


class _Tracker:
    """One of them, which may fail; its first failure is told in one line."""

    def __init__(self, name: str, make: Callable[[], Write], tell: Callable[[str], None]) -> None:
        self._name, self._make, self._tell = name, make, tell
        self._write: Write | None = None
        self._told, self._rests_until = False, 0.0
        self._attempt(self._begin)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        if time.monotonic() >= self._rests_until:
            self._attempt(lambda: self._begin()(figures, step))

    def _begin(self) -> Write:
        self._write = self._write or self._make()
        return self._write

    def _attempt(self, work: Callable[[], object]) -> None:
        began = time.monotonic()
        try:
            work()
        except Exception as error:  # each tracker has its own
            now = time.monotonic()
            self._rests_until = now + max(REST_S, REST_TIMES * (now - began))
            if not self._told:
                self._told = True
                self._tell(f"{self._name} takes no curves now ({reason(error)}); training goes on")


def _tell(notices: Path, line: str) -> None:
    """Leave a line for the driver: what a worker prints is not shown."""
    with suppress(OSError):  # a full disk ends the stage with its own message
        notices.parent.mkdir(parents=True, exist_ok=True)
        with notices.open("a", encoding="utf-8", errors="backslashreplace") as lines:
            lines.write(line + "\n")


def _ray_metrics(run: str, stage: str) -> Write:
    report = report_figures(run, stage)
    return lambda figures, step: report(figures)


def _tensorboard(folder: Path) -> Write:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(run: str, kept: Path) -> Write:
    """Needs wandb 0.19.10: arms that train together have a run each in one process (`create_new`)."""
    import wandb

    own = _kept_id(kept, "wandb", lambda: uuid.uuid4().hex)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    session = wandb.init(project=project, name=run, id=own, resume="allow", reinit="create_new")
    return lambda figures, step: session.log(dict(figures), step=step)


def _mlflow(run: str, kept: Path) -> Write:
    """By run id, not by MLflow's active run, of which a process has one."""
    import mlflow
    from mlflow.entities import Metric

    client = mlflow.MlflowClient()

    def begun() -> str:
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        return str(client.create_run(experiment.experiment_id, run_name=run).info.run_id)

    own = _kept_id(kept, "mlflow", begun)
    if not _has_run(client, own):
        own = _kept_id(kept, "mlflow", begun, anew=True)
    client.update_run(own, status="RUNNING")
    atexit.register(_ended, client, own)

    def write(figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(own, [Metric(name.replace("/", "."), each, now, step) for name, each in figures.items()])

    return write


def _has_run(client: Any, own: str) -> bool:
    """False if the server has deleted the run, or is another than the one that made it."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(own).info.lifecycle_stage != "deleted")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _ended(client: Any, own: str) -> None:
    with suppress(Exception):  # the process ends
        client.set_terminated(own)


def _kept_id(kept: Path, tracker: str, new: Callable[[], str], anew: bool = False) -> str:
    """A tracker's id of this stage; a new one (always if `anew`) is written down before it is used."""
    try:
        ids = {key: each for key, each in read_object(kept).items() if isinstance(each, str)} if kept.is_file() else {}
    except UserError:  # damaged
        ids = {}
    if anew or tracker not in ids:
        ids[tracker] = new()
        write_json(kept, ids)
    return ids[tracker]
