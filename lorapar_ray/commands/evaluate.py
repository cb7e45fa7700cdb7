"""Commands that evaluate: a run, models without a run, and lm-eval's own command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorapar_ray.commands.options import Overrides, Redo, RunDir, Verbose, config_and_run
from lorapar_ray.commands.stages import run_stages
from lorapar_ray.errors import UserError
from lorapar_ray.interrupts import status_of
from lorapar_ray.storage.uris import disk_path


def evaluate(
    config: Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML config of the run.")] = None,
    run_dir: RunDir = None,
    set_: Overrides = None,
    redo: Redo = None,
    verbose: Verbose = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="A directory, a hub name, package:NAME or BASE+ADAPTER; repeat it to compare."
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", "-t", help="With --model: gsm8k,mmlu@5 (examples in the prompt), a file.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="With --model: directory for the results.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="With --model: questions of each task (default: all).")
    ] = None,
    engines: Annotated[
        int | None, typer.Option("--engines", help="With --model: engines that share the questions.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME=PATH", help="With --model: local data of a task instead of the hub's."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="With --model: ask through its chat template.")] = False,
) -> None:
    own = {"--tasks": tasks, "--out": out, "--limit": limit, "--engines": engines, "--data": data, "--chat": chat}
    if not model:
        if given := [name for name, value in own.items() if value not in (None, False)]:
            raise UserError(f"{given[0]}: belongs to --model; in a run's config it is evaluate.{given[0][2:]}")
        if not config:
            raise UserError("evaluate: give --config of a run, or --model with --tasks and --out")
        loaded, run = config_and_run(config, run_dir, set_)
        run_stages(loaded, run, ("evaluate",), verbose, redo or ())
        return
    if config or run_dir or redo:
        raise UserError("--model: evaluates without a run; remove --config, --run-dir and --redo")
    if out is None:
        raise UserError("--out: needed with --model; results are written there, and a later command resumes there")
    fields = {"tasks": tasks.split(",") if tasks else None, "limit": limit, "engines": engines, "chat": chat or None}
    paths = dict(_name_and_path(each) for each in data) if data else None
    _evaluate_models(model, fields | {"data": paths}, set_ or [], disk_path(out, "--out").resolve(), verbose)


def _evaluate_models(
    models: list[str], fields: dict[str, object], overrides: list[str], out: Path, verbose: bool
) -> None:
    from lorapar_ray.evaluation.standalone import evaluate_models, evaluation_of
    from lorapar_ray.progress import console
    from lorapar_ray.reporting.evaluation_page import write_page

    asked = evaluation_of(models, fields, overrides)
    try:
        names = evaluate_models(asked, out, verbose)
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(status_of(interrupt)) from None
    console.print(f"report: {write_page(out, names)}")


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise UserError(f"--data: '{text}' is not NAME=PATH; write gsm8k=data/gsm8k")
    return name, path


def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line with our engines as a model: --model lorapar --model_args pretrained=..."""
    from lorapar_ray.evaluation.harness import require_lm_eval

    require_lm_eval("lm-eval")
    from lorapar_ray.evaluation.harness.command import run

    run(context.args)
