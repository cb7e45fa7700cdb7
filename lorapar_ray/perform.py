"""Runs a stage and records its state: begun, finished or interrupted."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lorapar_ray import trash
from lorapar_ray.capacity import capacity, growing
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.files import is_of_a_full_disk, no_space
from lorapar_ray.fingerprints import meaning
from lorapar_ray.gpus import place
from lorapar_ray.manifest import REDO
from lorapar_ray.memory_shortage import ended_without_memory, out_of_memory
from lorapar_ray.progress import console, noted_in
from lorapar_ray.run_metrics import report_progress
from lorapar_ray.runs import PROGRESS, RunDirectory
from lorapar_ray.stages import Stage
from lorapar_ray.standing import written
from lorapar_ray.text import one_line
from lorapar_ray.versions import versions_of_a_result


def perform(
    stage: Stage,
    config: Config,
    run: RunDirectory,
    inputs: dict[str, Any],
    *,
    spent: float,
    aside: Path | None,
    redo: str = "",
) -> None:
    """Do the work of a stage and record it (see `performing`).

    Raises:
        UserError: no space is left on the disk, or what the stage itself raises.
    """
    console.print(f"[bold]{stage.name}[/]", markup=True)
    with performing(stage, config, run, inputs, spent=spent, aside=aside, redo=redo) as notes:
        notes |= stage.run(placed(config, stage.name), run)
    console.print(f"[green]✓[/] {stage.name}: {run.entry(stage.name)['seconds']:.0f} s", markup=True)


@contextmanager
def performing(
    stage: Stage,
    config: Config,
    run: RunDirectory,
    inputs: dict[str, Any],
    *,
    spent: float,
    aside: Path | None,
    sharing: int = 1,
    redo: str = "",
) -> Iterator[dict[str, Any]]:
    """Record a stage around the block that does its work; what the block puts into the dict is recorded with it.

    Args:
        inputs: everything that changes its result (see `standing.inputs_of`).
        spent: seconds that it has run before it was interrupted.
        aside: folder of the results that it replaces. They are restored if it ends before it has written anything, and
            removed once it has finished.
        sharing: runs whose stages the block does together; each took its share of the seconds.
        redo: id of the redo under which it is computed anew, to be recorded with it; empty: of none.

    Raises:
        UserError: no space is left on the disk, or a process was killed since memory ran out.
    """
    name, prints = stage.name, run.fingerprints
    under = {REDO: redo} if redo else {}
    run.record(name, status="started", inputs=inputs, seconds=spent, **under)
    prints.save()
    if not stage.is_view:
        run.keep_config(config)
    start = time.monotonic()
    notes: dict[str, Any] = {}
    finished = False
    try:
        with (
            of_the_machine(run, name),
            growing(config.cluster),
            ended_without_memory(name) as advanced,
            noted_in(run.work / PROGRESS, name, partial(_reports, config.name, advanced)),
        ):
            yield notes
        finished = True
    finally:
        seconds = round(spent + (time.monotonic() - start) / sharing, 2)
        if not finished and run.root.is_dir():
            if aside is not None and not stage.owned(run, config.name):
                trash.put_back(run, name, aside)
            else:
                run.record(name, status="started", inputs=inputs, seconds=seconds, **under)
    run.record(
        name,
        status="done",
        inputs=inputs,
        outputs=meaning(stage.output_files(run, stage.passed_on), run.root, prints),
        written=written(stage, run, prints),
        seconds=seconds,
        versions=versions_of_a_result(),
        **under,
        **notes,
    )
    trash.empty(run, name)
    shutil.rmtree(run.work / "ray", ignore_errors=True)
    if run.remote is not None:
        run.remote.remove("work/ray")


def _reports(run: str, advanced: Callable[[], None], work: str, total: int) -> Callable[[int], None]:
    """A function that takes the count so far of a part of the stage; `advanced` is called whenever it has grown."""
    told, last = report_progress(run, work, total), 0

    def tell(done: int) -> None:
        nonlocal last
        told(done)
        if done > last:
            advanced()
        last = done

    return tell


def placed(config: Config, name: str) -> Config:
    """The config with the stage's `gpus: auto` as numbers for the cluster that this process is connected to."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return place(config, name, 0)
    return place(config, name, int(capacity().largest("GPU")))


@contextmanager
def of_the_machine(run: RunDirectory, stage: str) -> Iterator[None]:
    """A full disk, processes that were killed because memory ran out, and lost machines are not bugs.

    Raises:
        UserError: in place of those.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        causes = _causes(error)
        if any(map(is_of_a_full_disk, causes)):
            raise no_space(run.root) from error
        if (killed := _killed(causes)) is not None:
            raise out_of_memory(stage, killed) from error
        if (lost := _lost(error, causes)) is not None:
            raise UserError(
                f"{stage}: its workers or their machines were lost too often ({one_line(lost, 200)}); see Ray's logs "
                "of the workers and `ray status`; finished work is kept, and the same command resumes"
            ) from error
        raise


def _causes(error: BaseException) -> list[BaseException]:
    """An error and its causes, and theirs."""
    found: list[BaseException] = []
    left: list[Any] = [error]
    while left:
        each = left.pop(0)
        if isinstance(each, BaseException) and each not in found:
            found.append(each)
            workers = getattr(each, "worker_failures", {}).values()  # of Ray Train's groups
            others = [getattr(each, name, None) for name in ("cause", "controller_failure", "health_check_failure")]
            left += [*others, each.__cause__, *workers]
    return found


def _lost(error: BaseException, causes: Iterable[BaseException]) -> BaseException | None:
    """The error that says a worker of a Ray Train group is gone, if that ended the group; others fail with it."""
    ray = sys.modules.get("ray")
    if ray is None or not getattr(error, "worker_failures", {}):
        return None
    return next((each for each in causes if isinstance(each, ray.exceptions.RayActorError)), None)


def _killed(causes: Iterable[BaseException]) -> BaseException | None:
    """The error that says Ray has killed a process because its machine had no memory left, if that is the cause."""
    ray = sys.modules.get("ray")
    if ray is None:
        return None
    return next((each for each in causes if isinstance(each, ray.exceptions.OutOfMemoryError)), None)
