"""Commands that run stages: one for each, and `run` for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from lorapar_ray.commands.options import ConfigPath, Overrides, Redo, RunDir, Verbose, config_and_run, one, place_of
from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.interrupts import status_of
from lorapar_ray.manifest import REDO
from lorapar_ray.pipeline import PIPELINE, stages_of
from lorapar_ray.run_lock import WAIT
from lorapar_ray.runs import RunDirectory, looked_at


def stage_command(name: str) -> Callable[..., None]:
    """The command of a stage that has no options of its own."""

    def command(
        config: ConfigPath, run_dir: RunDir = None, set_: Overrides = None, redo: Redo = None, verbose: Verbose = False
    ) -> None:
        loaded, run = config_and_run(config, run_dir, set_)
        run_stages(loaded, run, (name,), verbose, redo or ())

    return command


def partition(
    config: ConfigPath,
    run_dir: RunDir = None,
    set_: Overrides = None,
    theta: Annotated[
        list[str] | None, typer.Option(help="θ, or several separated by commas: each is shown, the last one is kept.")
    ] = None,
    redo: Redo = None,
    verbose: Verbose = False,
) -> None:
    from lorapar_ray.preview import describe, preview
    from lorapar_ray.progress import console

    *shown, kept = one("--theta", theta).split(",") if theta else [None]
    for value in shown:
        loaded = load_config(one("--config", config), [*(set_ or []), f"partition.theta={value}"])
        with looked_at(place_of(loaded, run_dir)) as run:
            console.print(preview(loaded, run))
    overrides = [*(set_ or []), *([] if kept is None else [f"partition.theta={kept}"])]
    loaded, run = config_and_run(config, run_dir, overrides)
    run_stages(loaded, run, ("partition",), verbose, redo or ())
    console.print(describe(loaded, run))


def run_all(
    config: Annotated[list[Path] | None, typer.Argument(help="YAML config of the run.")] = None,
    config_option: Annotated[list[Path] | None, typer.Option("--config", "-c", help="The same, as an option.")] = None,
    run_dir: RunDir = None,
    set_: Overrides = None,
    redo: Redo = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved config and the plan; run nothing.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Every stage in order; finished ones are skipped."""
    given = [*(config or []), *(config_option or [])]
    if not given:
        raise UserError("run: no config given; write `lorapar run CONFIG.yaml`")
    if dry_run:
        from lorapar_ray.commands.dry_run import show_plan

        loaded = load_config(one("--config", given), set_ or [])
        with looked_at(place_of(loaded, run_dir)) as run:
            show_plan(loaded, run, redo or ())
    else:
        loaded, run = config_and_run(given, run_dir, set_)
        run_stages(loaded, run, stages_of(loaded), verbose, redo or ())


def run_stages(
    config: Config, run: RunDirectory, stages: tuple[str, ...], verbose: bool, redo: Sequence[str] = ()
) -> None:
    """Run those of `stages` that are due, and tell where the results are."""
    from lorapar_ray.engines.kept import keeping_engines
    from lorapar_ray.pending_redo import recorded, redo_of
    from lorapar_ray.pipeline import check, check_there, pending
    from lorapar_ray.progress import console
    from lorapar_ray.running import require_leave, run_stage, settle
    from lorapar_ray.session import ray_session

    check(config, stages, redo)
    with run.at_work(config, _seconds_to_wait()):
        settle(run)
        under = redo_of(config, run, stages, redo)
        require_leave(config, run, stages, under.allowed)
        again, unfinished = under.again(run), pending(config, run, stages)
        due = [name for name in stages if name in again or name in unfinished]
        needs_ray = any(PIPELINE[name].uses_ray(config) for name in due)
        if run.manifest().get(REDO, {}).get("id") == under.id and any(name in under.allowed for name in stages):
            console.print(f"  the redo of {', '.join(under.stages)} that was interrupted goes on")
        try:
            with (
                recorded(under, config, run, stages),
                ray_session(verbose) if needs_ray else nullcontext(),
                keeping_engines(due),
            ):
                check_there(config, due)
                for name in stages:
                    run_stage(config, run, name, under.how(run, name), under.id_for(name))
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(status_of(interrupt)) from None
    if not due:
        console.print(f"everything is done in '{run.place}'; nothing to do")
    if "report" in stages:
        console.print(f"report: {run.report / 'index.html'}")


def _seconds_to_wait() -> float:
    """How long to wait until another command leaves the run directory: a restarted job finds its dead driver's lock."""
    given = os.environ.get(WAIT, "0")
    try:
        return float(given)
    except ValueError:
        raise UserError(f"{WAIT}={given}: not a number of seconds") from None
