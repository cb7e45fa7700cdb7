"""Options that several commands have, and what they name: a config, a run directory, a run to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory, looked_at

Value = TypeVar("Value", str, Path)

ConfigPath = Annotated[list[Path], typer.Option("--config", "-c", help="YAML config of the run.")]
RunDir = Annotated[
    list[str] | None,
    typer.Option("--run-dir", "-d", help="The run directory: a path, s3:// or gs:// (default: runs/<name>)."),
]
ExistingRun = Annotated[list[str], typer.Option("--run-dir", "-d", help="The run's directory: a path, s3:// or gs://.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Set a config field; may be repeated."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the workers' own output.")]
Redo = Annotated[
    list[str] | None,
    typer.Option(
        "--redo", metavar="STAGE", help="Replace this stage's results and all that depend on them; may be repeated."
    ),
]


def one(option: str, values: Sequence[Value]) -> Value:
    """The value of an option that may be given once.

    Raises:
        UserError: it was given several times; all but one would be dropped silently.
    """
    if len(values) > 1:
        raise UserError(f"{option}: given {len(values)} times ({', '.join(map(str, values))}); keep one")
    return values[0]


def place_of(config: Config, run_dir: Sequence[str] | None) -> str:
    """Where the config's run is."""
    return one("--run-dir", run_dir) if run_dir else f"runs/{config.name}"


def config_and_run(
    config_path: Sequence[Path], run_dir: Sequence[str] | None, overrides: Sequence[str] | None
) -> tuple[Config, RunDirectory]:
    """The config of a run to work in, and its directory."""
    config = load_config(one("--config", config_path), list(overrides or []))
    return config, RunDirectory(place_of(config, run_dir))


@contextmanager
def run_to_read(
    run_dir: Sequence[str], overrides: Sequence[str] | None = None
) -> Iterator[tuple[Config, RunDirectory]]:
    """A run to read, with its own config."""
    with looked_at(one("--run-dir", run_dir)) as run:
        if not run.manifest():
            raise UserError(f"run directory '{run.place}' holds no run (no manifest.json)")
        yield load_config(run.root / "config.yaml", list(overrides or [])), run
