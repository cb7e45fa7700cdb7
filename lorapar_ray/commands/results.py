"""Commands that use a finished run: export its adapter or model, and serve it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from lorapar_ray.commands.options import ExistingRun, Overrides, Verbose, one, run_to_read
from lorapar_ray.storage.uris import disk_path


def export(
    run_dir: ExistingRun,
    out: Annotated[list[Path], typer.Option("--out", "-o", help="A directory that does not exist yet.")],
    stage: Annotated[list[str] | None, typer.Option(help="sft or grpo (default: the last of the run's order).")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model instead of the adapter.")] = False,
) -> None:
    """Write a finished adapter, or the merged model, with a card of its data, settings and results."""
    from lorapar_ray.exporting.job import export as write

    target, chosen = disk_path(one("--out", out), "--out"), one("--stage", stage) if stage else None
    with run_to_read(run_dir) as (config, run):
        done = write(config, run, target, chosen, merged=merged)
    print(f"{'merged model' if merged else 'adapter'} of {done} in '{target}'")


def serve(
    run_dir: ExistingRun,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines reach needs a key in LORAPAR_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Number of engines.")] = 1,
    set_: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Serve a run's base, its finished adapters (sft, grpo), and auto, which chooses one, by the OpenAI protocol."""
    from threading import Event

    from lorapar_ray.progress import console
    from lorapar_ray.serving.job import Address, server_key, serving
    from lorapar_ray.session import ray_session

    address = Address(host, port)
    server_key(address)
    with (
        run_to_read(run_dir, set_) as (config, run),
        ray_session(verbose),
        serving(config, run, address, replicas) as told,
    ):
        console.print(f"serving {', '.join(told['models'])} at {address.url}")
        if "agreement" in told:
            console.print(
                f"auto: the student's own vote agrees with the labels on {told['agreement']:.0%} (chance 50 %)"
            )
        with suppress(KeyboardInterrupt):
            Event().wait()
