"""Commands that only look: at a run's progress, and at the machine or the cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorapar_ray.commands.options import ExistingRun, Overrides, one
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.runs import looked_at


def status(
    run_dir: ExistingRun,
    once: Annotated[bool, typer.Option("--once", help="Print it once, also on a terminal.")] = False,
) -> None:
    """Show a run's progress: live on a terminal, else once."""
    from lorapar_ray.status import READ, follow, lines

    with looked_at(one("--run-dir", run_dir), *READ) as run:
        if once or not sys.stdout.isatty():
            print("\n".join(lines(run)))
        else:
            follow(run)


def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="Check every node of the cluster instead.")] = False,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", help="With --cluster: also check what this config needs (models, keys, room)."),
    ] = None,
    run_dir: Annotated[
        list[str] | None,
        typer.Option("--run-dir", "-d", help="With --cluster: also check that every node reaches this run directory."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Check versions, engines, cores, memory, disk, sandbox and Ray, one line each.

    --cluster asks the cluster of this machine, or of RAY_ADDRESS.
    """
    from lorapar_ray.doctor import examine
    from lorapar_ray.progress import console
    from lorapar_ray.text import markup

    for option, given in (("--config", config), ("--run-dir", run_dir), ("--set", set_)):
        if given and not cluster:
            raise UserError(f"{option}: needs --cluster; without it only this machine is checked, not a run")
    if set_ and not config:
        raise UserError("--set: changes a config; give that with --config")
    if cluster:
        from lorapar_ray.cluster_check import examine_cluster
        from lorapar_ray.session import ray_session

        loaded = load_config(one("--config", config), set_ or []) if config else None
        with ray_session(running=True):
            findings = examine_cluster(loaded, one("--run-dir", run_dir) if run_dir else None)
    else:
        findings = examine()
    for finding in findings:
        mark = "[green]✓[/]" if finding.ok else "[red]✗[/]"
        console.print(f"{mark} {finding.what:<12} {markup(finding.detail)}", markup=True)
    failed = [finding for finding in findings if not finding.ok]
    if cluster and failed:
        raise UserError(f"{failed[0].what}: {failed[0].detail}")
    if failed:
        raise typer.Exit(1)
