"""`lorapar`: one command per stage, one for all of them, and a doctor."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lorapar_ray.ablations.grids import GRIDS
from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.interrupts import status_of
from lorapar_ray.pipeline import ORDER, PIPELINE, stages_of
from lorapar_ray.run_lock import WAIT
from lorapar_ray.runs import RunDirectory, looked_at
from lorapar_ray.stages import Stage
from lorapar_ray.storage.uris import disk_path

OF_THE_PLACE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ELOOP,
    errno.EMFILE,
    errno.EIO,
    errno.ESTALE,
    errno.EBUSY,
)
"""Errors of a disk, a directory or a path, not of this program."""

Value = TypeVar("Value", str, Path)
Number = TypeVar("Number", int, float)

app = typer.Typer(
    help="LoRA-PAR on Ray: label, score, partition, SFT, GRPO, evaluate, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[list[Path], typer.Option("--config", "-c", help="YAML config of the run.")]
RunDir = Annotated[
    list[str] | None,
    typer.Option("--run-dir", "-d", help="The run directory: a path, s3:// or gs:// (default: runs/<name>)."),
]
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the workers' own output.")]
Redo = Annotated[
    list[str] | None,
    typer.Option("--redo", metavar="STAGE", help="Replace this stage's results and all that depend on them."),
]


def _one(option: str, values: Sequence[Value]) -> Value:
    """The value of an option that may be given once; a second one would be dropped silently."""
    if len(values) > 1:
        raise UserError(f"{option}: given {len(values)} times ({', '.join(map(str, values))}); keep one")
    return values[0]


def _open(
    config_path: Sequence[Path], run_dir: Sequence[str] | None, overrides: list[str] | None
) -> tuple[Config, RunDirectory]:
    config = load_config(_one("--config", config_path), overrides or [])
    return config, RunDirectory(_place(config, run_dir))


def _place(config: Config, run_dir: Sequence[str] | None) -> str:
    return _one("--run-dir", run_dir) if run_dir else f"runs/{config.name}"


@contextmanager
def _finished(run_dir: Sequence[str], overrides: list[str]) -> Iterator[tuple[Config, RunDirectory]]:
    """A run to read, with its own config."""
    with looked_at(_one("--run-dir", run_dir)) as run:
        if not run.manifest():
            raise UserError(f"run directory '{run.place}' holds no run (no manifest.json)")
        yield load_config(run.root / "config.yaml", overrides), run


def _execute(
    config: Config, run: RunDirectory, stages: tuple[str, ...], verbose: bool, redo: Sequence[str] = ()
) -> None:
    from lorapar_ray.pipeline import check, dependents, pending, require_leave, run_stage
    from lorapar_ray.progress import console
    from lorapar_ray.session import ray_session

    check(config, stages, redo)
    with run.at_work(config, _seconds_to_wait()):
        require_leave(config, run, stages, redo)
        due = [name for name in stages if name in redo or name in pending(config, run, stages)]
        replaced = dependents(config, redo)
        needs_ray = any(PIPELINE[name].uses_ray(config) for name in due)
        try:
            with ray_session(verbose) if needs_ray else nullcontext():
                for name in stages:
                    run_stage(config, run, name, "yes" if name in redo else "if_changed" if name in replaced else "no")
        except KeyboardInterrupt as interrupt:
            again = "the same command, without --redo," if redo else "the same command"
            raise typer.Exit(status_of(interrupt, again)) from None
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


def _stage_command(stage: Stage) -> None:
    def command(
        config: ConfigPath,
        run_dir: RunDir = None,
        set_: Overrides = None,
        redo: Redo = None,
        verbose: Verbose = False,
    ) -> None:
        loaded, run = _open(config, run_dir, set_)
        _execute(loaded, run, (stage.name,), verbose, redo or ())

    app.command(stage.name, help=stage.help)(command)


for _stage in ORDER:
    if _stage.name not in ("partition", "evaluate"):
        _stage_command(_stage)


@app.command("partition", help=PIPELINE["partition"].help + " With several θ, show each cut.")
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

    *shown, kept = _one("--theta", theta).split(",") if theta else [None]
    for value in shown:
        loaded = load_config(_one("--config", config), [*(set_ or []), f"partition.theta={value}"])
        with looked_at(_place(loaded, run_dir)) as run:
            console.print(preview(loaded, run))
    loaded, run = _open(config, run_dir, [*(set_ or []), *([] if kept is None else [f"partition.theta={kept}"])])
    _execute(loaded, run, ("partition",), verbose, redo or ())
    console.print(describe(loaded, run))


@app.command("evaluate", help=PIPELINE["evaluate"].help + " With --model no run is needed.")
def evaluate(
    config: Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML config of the run.")] = None,
    run_dir: RunDir = None,
    set_: Overrides = None,
    redo: Redo = None,
    verbose: Verbose = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="A directory, a hub name, package:NAME or BASE+ADAPTER; several to compare."
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", "-t", help="With --model: gsm8k,mmlu@5 (examples in the prompt), a file.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="With --model: directory for the results.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Questions of each task (default: all).")] = None,
    engines: Annotated[int | None, typer.Option("--engines", help="Engines that share the questions.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="NAME=PATH", help="Local data instead of the hub's.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
) -> None:
    own = {"--tasks": tasks, "--out": out, "--limit": limit, "--engines": engines, "--data": data, "--chat": chat}
    if not model:
        if given := [name for name, value in own.items() if value not in (None, False)]:
            raise UserError(f"{given[0]}: belongs to --model; in a run's config it is evaluate.{given[0][2:]}")
        if not config:
            raise UserError("evaluate: give --config of a run, or --model with --tasks and --out")
        loaded, run = _open(config, run_dir, set_)
        _execute(loaded, run, ("evaluate",), verbose, redo or ())
        return
    if config or run_dir or redo:
        raise UserError("--model: evaluates without a run; remove --config, --run-dir and --redo")
    if out is None:
        raise UserError("--out: needed with --model; results are written there, and a later command resumes there")
    from lorapar_ray.evaluation.standalone import evaluate_models, evaluation_of
    from lorapar_ray.progress import console
    from lorapar_ray.reporting.evaluation_page import write_page

    fields = {"tasks": tasks.split(",") if tasks else None, "limit": limit, "engines": engines, "chat": chat or None}
    paths = dict(_name_and_path(each) for each in data) if data else None
    out = disk_path(out, "--out").resolve()
    asked = evaluation_of(model, fields | {"data": paths}, set_ or [])
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


@app.command(
    "lm-eval",
    help="lm-eval's own command line with our engines as a model: --model lorapar --model_args pretrained=...",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    from lorapar_ray.evaluation.harness import require_lm_eval

    require_lm_eval("lm-eval")
    from lorapar_ray.evaluation.harness.command import run

    run(context.args)


@app.command("run", help="Every stage in order; finished ones are skipped.")
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
    given = [*(config or []), *(config_option or [])]
    if not given:
        raise UserError("run: no config given; write `lorapar run CONFIG.yaml`")
    if dry_run:
        loaded = load_config(_one("--config", given), set_ or [])
        with looked_at(_place(loaded, run_dir)) as run:
            _show_plan(loaded, run, redo or ())
    else:
        loaded, run = _open(given, run_dir, set_)
        _execute(loaded, run, stages_of(loaded), verbose, redo or ())


def _show_plan(config: Config, run: RunDirectory, redo: Sequence[str]) -> None:
    from lorapar_ray.grpo.stage import require_shared_sequences
    from lorapar_ray.pipeline import require_stages
    from lorapar_ray.plan import plan
    from lorapar_ray.progress import console
    from lorapar_ray.text import shown

    require_stages(config, stages_of(config), redo)
    if "grpo" in stages_of(config):
        require_shared_sequences(config)
    print(shown(config.to_yaml(hide_secrets=True)))
    console.print(f"run directory: {run.place}")
    for line in plan(config, run, redo):
        console.print(f"  {line}")
    _show_memory(config)


def _show_memory(config: Config) -> None:
    """The run's memory use on its GPUs, if any.

    Raises:
        UserError: a process cannot fit.
    """
    from lorapar_ray.gpu_memory.device import device_of
    from lorapar_ray.progress import console

    device = device_of(config)
    if not device.count or config.adapter.method != "lora":
        return
    from lorapar_ray.gpu_memory import memory_lines, student_size

    try:
        size = student_size(config.model, config.adapter)
    except UserError as error:
        console.print(f"GPU memory: not estimated here: {error}")
        return
    console.print("GPU memory:")
    for line in memory_lines(config, stages_of(config), size, device):
        console.print(f"  {line}")


@app.command(
    "submit", help="Check a cluster and run a config on it as a Ray job; the same command again follows that job."
)
def submit(
    config: Annotated[list[Path], typer.Argument(help="YAML config of the run, inside the working directory.")],
    run_dir: Annotated[list[str], typer.Option("--run-dir", "-d", help="On storage that every node reaches.")],
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
    from lorapar_ray.pipeline import require_stages
    from lorapar_ray.submission import Jobs, Submission, in_working_dir, require_no_secret, require_whole_path

    path = _one("CONFIG", config)
    loaded = load_config(path, set_ or [])
    place = _one("--run-dir", run_dir)
    require_whole_path(place)
    require_no_secret(set_ or [])
    require_stages(loaded, stages_of(loaded), redo or ())
    root, inside = in_working_dir(path, _one("--working-dir", working_dir) if working_dir else None)
    options = ["--config", str(inside), *(word for each in set_ or [] for word in ("--set", each))]
    again = tuple(word for each in redo or [] for word in ("--redo", each))
    jobs = Jobs(_one("--address", address) if address else None)
    handed = Submission(loaded.name, str(place), tuple(options), root, again)
    if check:
        jobs.check(handed)
    job = jobs.submit(handed)
    if follow:
        try:
            jobs.wait(job)
        except KeyboardInterrupt:
            left = f"the same command follows it again, `ray job stop {job}` ends it"
            print(f"lorapar: {job} keeps running; {left}", file=sys.stderr)
            raise typer.Exit(130) from None


@app.command("status", help="Show a run's progress: live on a terminal, else once.")
def status(
    run_dir: Annotated[list[str], typer.Option("--run-dir", "-d", help="Of the run.")],
    once: Annotated[bool, typer.Option("--once", help="Do not follow.")] = False,
) -> None:
    from lorapar_ray.status import READ, follow, lines

    with looked_at(_one("--run-dir", run_dir), *READ) as run:
        if once or not sys.stdout.isatty():
            print("\n".join(lines(run)))
        else:
            follow(run)


@app.command("export", help="A finished adapter, or the merged model, with a card of its data, settings and results.")
def export(
    run_dir: Annotated[list[str], typer.Option("--run-dir", "-d", help="Of the run.")],
    out: Annotated[list[Path], typer.Option("--out", "-o", help="A directory that does not exist yet.")],
    stage: Annotated[list[str] | None, typer.Option(help="sft or grpo (default: the last of the run's order).")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model instead of the adapter.")] = False,
) -> None:
    from lorapar_ray.exporting.job import export as write

    target, chosen = disk_path(_one("--out", out), "--out"), _one("--stage", stage) if stage else None
    with _finished(run_dir, []) as (config, run):
        done = write(config, run, target, chosen, merged=merged)
    print(f"{'merged model' if merged else 'adapter'} of {done} in '{target}'")


@app.command("serve", help="A finished run behind the OpenAI protocol: base, sft, grpo, and auto, which chooses.")
def serve(
    run_dir: Annotated[list[str], typer.Option("--run-dir", "-d", help="Of the run.")],
    host: Annotated[str, typer.Option(help="Any other host needs a key in LORAPAR_API_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Number of engines.")] = 1,
    set_: Overrides = None,
    verbose: Verbose = False,
) -> None:
    from threading import Event

    from lorapar_ray.progress import console
    from lorapar_ray.serving.job import Address, server_key, serving
    from lorapar_ray.session import ray_session

    address = Address(host, port)
    server_key(address)
    with (
        _finished(run_dir, set_ or []) as (config, run),
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


@app.command("ablate", help="Run a grid of arms, and report which claims hold. Grids: " + ", ".join(GRIDS) + ".")
def ablate(
    grid: Annotated[str, typer.Argument(help="Which arms.")],
    config: Annotated[Path, typer.Argument(help="YAML config that the arms change.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory for the arms and the table (default: runs/<name>-<grid>)."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "1,2,3,4,5",
    rates: Annotated[str, typer.Option(help="Learning rates of a sweep, relative to the config's.")] = "0.25,0.5,1,2,4",
    only: Annotated[list[str] | None, typer.Option("--only", metavar="ARM", help="Run only this arm.")] = None,
    set_: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the arms and what they share; run nothing.")] = False,
    verbose: Verbose = False,
) -> None:
    from lorapar_ray.ablations.job import described, make_plan, run_plan

    folder = disk_path(out, "--out") if out else Path("runs") / f"{load_config(config, set_ or []).name}-{grid}"
    plan = make_plan(
        grid,
        config,
        set_ or [],
        folder,
        seeds=_numbers("--seeds", seeds, int),
        only=only or [],
        rates=_numbers("--rates", rates, float),
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


@app.command("doctor", help="Check versions, engines, cores, memory, disk and Ray, one line each.")
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="Check every node of RAY_ADDRESS instead.")] = False,
    config: Annotated[list[Path] | None, typer.Option("--config", "-c", help="With --cluster.")] = None,
    run_dir: RunDir = None,
    set_: Overrides = None,
) -> None:
    from lorapar_ray.doctor import examine
    from lorapar_ray.progress import console
    from lorapar_ray.text import markup

    if cluster:
        from lorapar_ray.cluster_check import examine_cluster
        from lorapar_ray.session import ray_session

        loaded = load_config(_one("--config", config), set_ or []) if config else None
        with ray_session():
            findings = examine_cluster(loaded, _one("--run-dir", run_dir) if run_dir else None)
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


def main() -> None:
    """Entry point: a user's error is one line and exit status 2."""
    from lorapar_ray.redact import remember_environment
    from lorapar_ray.text import one_line

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    remember_environment()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it warns of a kernel that it lacks
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that is not UTF-8 shows escapes, not a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except UserError as error:
        said: object = getattr(error, "cause", error)  # one from a Ray task carries the task's traceback
    except OSError as error:
        found: object = getattr(error, "cause", error)
        if not isinstance(found, OSError) or found.errno not in OF_THE_PLACE:
            raise
        said = f"'{found.filename}': {found.strerror}; make it writable, free disk space, or choose another --run-dir"
    else:
        return
    print(f"lorapar: {one_line(said)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
