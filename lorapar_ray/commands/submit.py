"""The command that runs a config on a cluster, as a Ray job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorapar_ray.commands.options import Overrides, Redo, one
from lorapar_ray.config_file import load_config
from lorapar_ray.files import digest
from lorapar_ray.pipeline import require_stages, stages_of
from lorapar_ray.redact import redacted


def submit(
    config: Annotated[list[Path], typer.Argument(help="YAML config of the run, inside the working directory.")],
    run_dir: Annotated[
        list[str], typer.Option("--run-dir", "-d", help="The run directory, on storage that every node reaches.")
    ],
    address: Annotated[
        list[str] | None, typer.Option(help="URL of the cluster's dashboard (default: $RAY_API_SERVER_ADDRESS).")
    ] = None,
    set_: Overrides = None,
    redo: Redo = None,
    working_dir: Annotated[
        list[Path] | None, typer.Option(help="Sent to the cluster: code and config (default: this directory).")
    ] = None,
    check: Annotated[bool, typer.Option(help="Check every node first.")] = True,
    follow: Annotated[bool, typer.Option(help="Show the job's log until it ends.")] = True,
) -> None:
    """Check a cluster and run a config on it as a Ray job; the same command again follows that job."""
    from lorapar_ray.job_log import keeps_running
    from lorapar_ray.submission import Jobs, Submission, in_working_dir, require_no_secret, require_whole_path

    path = one("CONFIG", config)
    loaded = load_config(path, set_ or [])
    place = one("--run-dir", run_dir)
    require_whole_path(place)
    require_no_secret(set_ or [])
    require_stages(loaded, stages_of(loaded), redo or ())
    root, inside = in_working_dir(path, one("--working-dir", working_dir) if working_dir else None)
    options = ["--config", str(inside), *(word for each in set_ or [] for word in ("--set", each))]
    settings = digest(redacted(loaded.model_dump(mode="json")))  # the dashboard shows it
    jobs = Jobs(one("--address", address) if address else None)
    handed = Submission(loaded.name, str(place), tuple(options), root, tuple(redo or ()), settings)
    job = jobs.submit(handed, check=check)
    if follow:
        try:
            jobs.wait(job)
        except KeyboardInterrupt:
            print(f"lorapar: {keeps_running(job)}", file=sys.stderr)
            raise typer.Exit(130) from None
