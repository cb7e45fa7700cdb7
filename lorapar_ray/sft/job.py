"""Stage 1 and the warm-up, as jobs on Ray Train."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorapar_ray.adapters.export import export_plain
from lorapar_ray.boundary import last_line
from lorapar_ray.config import Config, SftConfig
from lorapar_ray.datasets.labelled import require_room, token_table
from lorapar_ray.datasets.tokens import Selection, TokenTable
from lorapar_ray.progress import progress
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.batches import steps_in, validation_rows
from lorapar_ray.sft.worker import SftJob, train_worker
from lorapar_ray.student import RESIDUAL_INITS, base_reference, starting_adapter
from lorapar_ray.tracking import require_trackers
from lorapar_ray.workers import run_workers


def train_stage1(config: Config, run: RunDirectory) -> dict[str, Any]:
    """SFT of the stage 1 elements on the rows of `sft.systems`; writes `sft/adapter`.

    Raises:
        UserError: no labelled row belongs to those Systems, every prompt is longer than `sft.max_length`, or a tracker
            of `sft.report_to` is not installed.
    """
    job, notes = stage1_job(config, run)
    _run(job, config.sft, notes["examples"], "sft", run)
    export_if_residual(config, run)
    return notes


def stage1_job(config: Config, run: RunDirectory) -> tuple[SftJob, dict[str, Any]]:
    """Stage 1 of a run as a job for workers, and its notes for the manifest.

    Raises:
        UserError: as `train_stage1`.
    """
    require_trackers(config.sft.report_to, "sft.report_to")
    tokens = token_table(config, run)
    chosen = Selection(str(tokens.resolve()), config.sft.systems, "sft.systems", config.sft.max_length)
    regions = run.partition / "regions.safetensors" if config.sft.masked else None
    out = run.sft / ("trained" if residual(config) else "adapter")
    (count,) = require_room(run, TokenTable(tokens), [chosen], stage="sft", field="sft.max_length")
    trained_on = count - validation_rows(count, config.sft.validation)
    job = _job(config, run, config.sft, chosen, "sft", starting_adapter(config, run, "sft"), out, regions)
    return job, {"examples": trained_on, "steps": steps_in(config.sft, trained_on)}


def export_if_residual(config: Config, run: RunDirectory) -> None:
    """Export the trained adapter of a residual base as a plain LoRA for the original base."""
    if residual(config):
        export_plain(run.adapter, run.sft / "trained", run.sft / "adapter", config.model.path)


def residual(config: Config) -> bool:
    """Whether the adapter trains on a residual base."""
    return config.adapter.method == "lora" and config.adapter.init in RESIDUAL_INITS


def warm_up_job(config: Config, run: RunDirectory, adapter: Path, chosen: Selection) -> SftJob:
    """A few unmasked steps on both Systems, so that a zero-B adapter can be scored (method, section 2).

    The scoring workers take these steps before they score, which saves the start of another group.
    """
    score = config.score
    settings = config.sft.warmup(config.adapter).model_copy(
        update={key: getattr(score, key) for key in ("workers", "max_workers", "resources", "sharding")}
    )
    chosen = replace(chosen, max_length=settings.max_length)
    require_room(run, TokenTable(Path(chosen.path)), [chosen], stage="warmup", field="sft.max_length")
    return _job(config, run, settings, chosen, "warmup", adapter, run.adapter, None)


def _job(
    config: Config,
    run: RunDirectory,
    settings: SftConfig,
    chosen: Selection,
    name: str,
    adapter_in: Path,
    adapter_out: Path,
    regions: Path | None,
) -> SftJob:
    return SftJob(
        name=f"{config.name}-{name}",
        model=config.model.model_dump(mode="json"),
        adapter=config.adapter.model_dump(mode="json"),
        settings=settings.model_dump(mode="json"),
        base=base_reference(config.model, run),
        adapter_in=str(adapter_in.resolve()),
        adapter_out=str(adapter_out.resolve()),
        examples=asdict(chosen),
        regions=None if regions is None else str(regions.resolve()),
        checkpoints=str((run.work / name / "checkpoints").resolve()),
        metrics=str((run.metrics / f"{name}.jsonl").resolve()),
        seed=config.seed,
    )


def _run(job: SftJob, settings: SftConfig, examples: int, name: str, run: RunDirectory) -> None:
    total = steps_in(settings, examples)
    with progress(name, total, lambda: steps_done(Path(job.metrics))):
        run_workers(
            train_worker,
            job.payload(),
            name=name,
            workers=settings.workers,
            max_workers=settings.max_workers,
            resources=settings.resources,
            run=run,
            writes=[Path(job.checkpoints), Path(job.adapter_out), run.metrics],
        )
    shutil.rmtree(job.checkpoints, ignore_errors=True)


def steps_done(metrics: Path) -> tuple[int, str]:
    """Steps so far and a remark, for a progress bar."""
    last = last_line(metrics)
    if not last:
        return 0, "starting workers"
    return last["step"], f"loss {last['loss']:.3f} · {last['tokens_per_s']:.0f} tokens/s"
