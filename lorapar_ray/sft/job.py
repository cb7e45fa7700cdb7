"""Stage 1 and the warm-up, as jobs on Ray Train."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorapar_ray.adapters.export import export_plain
from lorapar_ray.config import Config, SftConfig
from lorapar_ray.datasets.labelled import require_room, token_table
from lorapar_ray.datasets.tokens import Selection, TokenTable
from lorapar_ray.progress import progress, training_progress
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.batches import steps_in, validation_rows
from lorapar_ray.sft.worker import SftJob, train_worker
from lorapar_ray.student import RESIDUAL_INITS, base_reference, starting_adapter
from lorapar_ray.tracking import notices_of, require_trackers
from lorapar_ray.workers import run_workers


@dataclass(frozen=True)
class Part:
    """One training of stage 1: all of it, or one System of a sequence."""

    folder: Path
    """Where its adapter goes."""
    job: SftJob
    title: str
    examples: int
    steps: int

    @property
    def trained(self) -> bool:
        """Whether its last step is taken: workers write the adapter last, and whole."""
        return (Path(self.job.adapter_out) / "adapter_config.json").is_file()

    @property
    def finished(self) -> bool:
        """Whether its adapter is written."""
        return (self.folder / "adapter" / "adapter_config.json").is_file()


def train_stage1(config: Config, run: RunDirectory) -> dict[str, Any]:
    """SFT of the stage 1 elements on the rows of `sft.systems`; writes `sft/adapter`.

    In a sequence each System trains from the adapter before; all but the last write `sft/system<k>/adapter`.

    Raises:
        UserError: no labelled row belongs to those Systems, every prompt is longer than `sft.max_length`, or a tracker
            of `sft.report_to` is not installed.
    """
    parts = stage1_parts(config, run)
    for part in parts:
        if part is parts[-1] or not part.finished:
            train_part(part, config, run)
    return notes_of(parts)


def train_part(part: Part, config: Config, run: RunDirectory) -> None:
    """Train one part of stage 1; if a command ended between its last step and the end of the stage, only finish it."""
    if not part.trained:
        _run(part.job, config.sft, part.steps, part.title, run)
    finish_part(part, config, run)


def finish_part(part: Part, config: Config, run: RunDirectory) -> None:
    """Export the trained adapter of a residual base as a plain LoRA for the original base, and remove checkpoints."""
    if residual(config):
        export_plain(run.adapter, part.folder / "trained", part.folder / "adapter", config.model.path)
    shutil.rmtree(part.job.checkpoints, ignore_errors=True)


def notes_of(parts: Sequence[Part]) -> dict[str, Any]:
    """What the manifest says about stage 1."""
    return {"examples": sum(part.examples for part in parts), "steps": sum(part.steps for part in parts)}


def stage1_parts(config: Config, run: RunDirectory) -> list[Part]:
    """Stage 1 of a run as jobs for workers; each starts from the adapter that the one before writes.

    Raises:
        UserError: as `train_stage1`.
    """
    settings = config.sft
    require_trackers(settings.report_to, "sft.report_to")
    tokens = token_table(config, run)
    chosen = [Selection(str(tokens.resolve()), each, "sft.systems", settings.max_length) for each in settings.parts]
    counts = require_room(run, TokenTable(tokens), chosen, stage="sft", field="sft.max_length")
    by_stage = config.partition.regions == "stages"
    regions = run.partition / ("regions.safetensors" if by_stage else "systems.safetensors")
    parts: list[Part] = []
    start = starting_adapter(config, run, "sft")
    names = [name for name in config.trained if name.startswith("sft")]
    for name, selection, count in zip(names, chosen, counts, strict=True):
        folder = run.trained(name)
        out = folder / ("trained" if residual(config) else "adapter")
        place = str(folder.relative_to(run.root))
        job = _job(config, run, settings, selection, place, start, out, regions if settings.masked else None)
        job = job if by_stage else replace(job, systems=selection.systems)
        title = f"sft, System {selection.systems[0]}" if settings.sequence else "sft"
        examples = count - validation_rows(count, settings.validation)
        parts.append(Part(folder, job, title, examples, steps_in(settings, examples)))
        start = out
    return parts


def residual(config: Config) -> bool:
    """Whether the adapter trains on a residual base."""
    return config.adapter.method == "lora" and config.adapter.init in RESIDUAL_INITS


def warm_up_job(config: Config, run: RunDirectory, adapter: Path, chosen: Selection) -> SftJob:
    """A few unmasked steps on both Systems, so that a zero-B adapter can be scored: B = 0 has no importance.

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
        name=f"{config.name}-{name.replace('/', '-')}",
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


def _run(job: SftJob, settings: SftConfig, steps: int, title: str, run: RunDirectory) -> None:
    with progress(title, steps, lambda: steps_done(job.metrics), [notices_of(job.metrics)]):
        run_workers(
            train_worker,
            job.payload(),
            name="sft",
            workers=settings.workers,
            max_workers=settings.max_workers,
            resources=settings.resources,
            run=run,
            writes=[Path(job.checkpoints), Path(job.adapter_out), run.metrics],
        )


def steps_done(*metrics: str) -> tuple[int, str]:
    """See `training_progress`."""
    return training_progress(metrics, "starting workers", _remark)


def _remark(last: Sequence[dict[str, Any]]) -> str:
    losses = ", ".join(f"{line['loss']:.3f}" if "loss" in line else "not finite" for line in last)
    return f"loss {losses} · {sum(line['tokens_per_s'] for line in last):.0f} tokens/s"
