"""The command that runs a grid of arms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lorapar_ray.ablations.grid import RATES, VALIDATION
from lorapar_ray.commands.options import Overrides, Verbose
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.interrupts import status_of
from lorapar_ray.storage.uris import disk_path

Number = TypeVar("Number", int, float)
USUAL_RATES = ",".join(f"{rate:g}" for rate in RATES)


def ablate(
    grid: Annotated[str, typer.Argument(help="Which arms.")],
    config: Annotated[Path, typer.Argument(help="YAML config that the arms change.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory for the arms and the table (default: runs/<name>-<grid>)."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of each arm, separated by commas.")] = "1,2,3,4,5",
    rates: Annotated[str, typer.Option(help="Learning rates of a sweep, relative to the config's.")] = USUAL_RATES,
    validation: Annotated[float, typer.Option(help="Share of the training rows that a sweep holds out.")] = VALIDATION,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="ARM", help="Run only this arm; may be repeated.")
    ] = None,
    set_: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the arms and what they share; run nothing.")] = False,
    verbose: Verbose = False,
) -> None:
    from lorapar_ray.ablations.description import described
    from lorapar_ray.ablations.job import run_plan
    from lorapar_ray.ablations.plan import make_plan

    folder = disk_path(out, "--out") if out else Path("runs") / f"{load_config(config, set_ or []).name}-{grid}"
    plan = make_plan(
        grid,
        config,
        set_ or [],
        folder,
        seeds=_numbers("--seeds", seeds, int),
        only=only or [],
        rates=_numbers("--rates", rates, float),
        validation=validation,
    )
    if dry_run:
        print("\n".join(described(plan)))
        return
    try:
        failed = run_plan(plan, verbose=verbose)
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(status_of(interrupt)) from None
    if failed:
        raise UserError(f"{len(failed)} of the runs failed, the others are in '{folder}/table.md'; first: {failed[0]}")


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: give numbers separated by commas") from None
