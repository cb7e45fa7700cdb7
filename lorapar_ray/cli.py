"""`lorapar`: one command per stage, one for all of them, and a doctor."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory

app = typer.Typer(
    help="LoRA-PAR on Ray: label, score, partition, SFT, GRPO, evaluate, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="YAML config of the run.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", "-d", help="Where the run lives [default: runs/<name>].")]
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the workers' own output.")]


def _open(config_path: Path, run_dir: Path | None, overrides: list[str] | None) -> tuple[Config, RunDirectory]:
    config = load_config(config_path, overrides or [])
    return config, RunDirectory((run_dir or Path("runs") / config.name).absolute())


def _execute(config: Config, run: RunDirectory, stages: tuple[str, ...], verbose: bool) -> None:
    from lorapar_ray.pipeline import PIPELINE, check, pending, run_stage
    from lorapar_ray.progress import console
    from lorapar_ray.session import ray_session

    check(config, stages)
    run.open(config)
    due = pending(config, run, stages)
    needs_ray = any(PIPELINE[name].uses_ray(config) for name in due)
    try:
        with ray_session(verbose) if needs_ray else nullcontext():
            for name in stages:
                run_stage(config, run, name)
    except KeyboardInterrupt:
        print("lorapar: interrupted; the same command continues where it stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    if not due:
        console.print(f"everything is done in '{run.root}'; nothing to do")
    if "report" in stages:
        console.print(f"report: {run.report / 'index.html'}")


def _stage_command(name: str, help_text: str) -> None:
    def command(config: ConfigPath, run_dir: RunDir = None, set_: Overrides = None, verbose: Verbose = False) -> None:
        loaded, run = _open(config, run_dir, set_)
        _execute(loaded, run, (name,), verbose)

    app.command(name, help=help_text)(command)


for _name, _help in {
    "label": "Let the teachers vote which System each training question belongs to.",
    "score": "Make the adapter and score each of its elements for both Systems.",
    "sft": "Stage 1: masked SFT on System 1 rows.",
    "grpo": "Stage 2: masked GRPO on System 2 rows.",
    "evaluate": "Greedy accuracy of the base, stage 1 and stage 2 on the test rows.",
    "report": "Write report/index.html from whatever the run holds.",
}.items():
    _stage_command(_name, _help)


@app.command("partition", help="Cut the scored adapter at θ, α, β; with several θ, show each cut.")
def partition(
    config: ConfigPath,
    run_dir: RunDir = None,
    set_: Overrides = None,
    theta: Annotated[
        str | None, typer.Option(help="θ, or several separated by commas: each is shown, the last one is kept.")
    ] = None,
) -> None:
    from lorapar_ray.pipeline import run_stage
    from lorapar_ray.progress import console

    for value in [None] if theta is None else theta.split(","):
        overrides = [*(set_ or []), *([] if value is None else [f"partition.theta={value}"])]
        loaded, run = _open(config, run_dir, overrides)
        run.open(loaded)
        run_stage(loaded, run, "partition")
        console.print(describe_partition(run))


def describe_partition(run: RunDirectory) -> str:
    """One line about the regions on disk."""
    import json

    summary = json.loads((run.partition / "summary.json").read_text())
    shares = ", ".join(f"{name} {share:.2%}" for name, share in summary["total"]["shares"].items())
    return f"  θ {summary['theta']:g}: {shares}; Jaccard {summary['overlap']['jaccard']:.3f}"


@app.command("run", help="Every stage in order; finished ones are skipped.")
def run_all(
    config: Annotated[Path | None, typer.Argument(help="YAML config of the run.")] = None,
    config_option: Annotated[Path | None, typer.Option("--config", "-c", help="The same, as an option.")] = None,
    run_dir: RunDir = None,
    set_: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved config and the plan; run nothing.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    from lorapar_ray.pipeline import stages_of

    path = config or config_option
    if path is None:
        raise UserError("run: no config given; write `lorapar run CONFIG.yaml`")
    loaded, run = _open(path, run_dir, set_)
    if dry_run:
        _show_plan(loaded, run)
    else:
        _execute(loaded, run, stages_of(loaded), verbose)


def _show_plan(config: Config, run: RunDirectory) -> None:
    from lorapar_ray.pipeline import pending, stages_of
    from lorapar_ray.progress import console
    from lorapar_ray.resources import resources_of
    from lorapar_ray.text import shown

    due, asked = pending(config, run), resources_of(config)
    print(shown(config.to_yaml()))
    console.print(f"run directory: {run.root}")
    for name in stages_of(config):
        console.print(f"  {name:<10} {'will run' if name in due else 'done    '}  {asked[name]}")


@app.command("doctor", help="Check versions, engines, cores, memory, disk and Ray, a line each.")
def doctor() -> None:
    from lorapar_ray.doctor import examine
    from lorapar_ray.progress import console
    from lorapar_ray.text import markup

    findings = examine()
    for finding in findings:
        mark = "[green]✓[/]" if finding.ok else "[red]✗[/]"
        console.print(f"{mark} {finding.what:<12} {markup(finding.detail)}", markup=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a user's error is one line and exit status 2."""
    from lorapar_ray.redact import remember_environment
    from lorapar_ray.text import one_line

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    remember_environment()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that is not UTF-8 shows escapes, not a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"lorapar: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
