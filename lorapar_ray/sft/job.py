"""Stage 1 and the warm-up, as jobs on Ray Train."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import last_line, read_object
from lorapar_ray.config import Config, SftConfig
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.datasets.labelled import encode_rows, labelled_rows
from lorapar_ray.progress import progress
from lorapar_ray.runs import RunDirectory, write_json
from lorapar_ray.sft.batches import split_validation, steps_in
from lorapar_ray.sft.tracking import require_trackers
from lorapar_ray.sft.worker import SftJob, train_worker
from lorapar_ray.student import RESIDUAL_INITS, base_path, starting_adapter
from lorapar_ray.workers import run_workers


def train_stage1(config: Config, run: RunDirectory) -> dict[str, Any]:
    """SFT of the stage 1 elements on the rows of `sft.systems`; writes `sft/adapter`.

    Raises:
        UserError: no labelled row belongs to those Systems, every prompt is longer than `sft.max_length`, or a tracker
            of `sft.report_to` is not installed.
    """
    require_trackers(config.sft.report_to, "sft.report_to")
    rows = labelled_rows(run, config.sft.systems, "sft.systems")
    regions = run.partition / "regions.safetensors" if config.sft.masked else None
    residual = config.adapter.method == "lora" and config.adapter.init in RESIDUAL_INITS
    out = run.sft / ("trained" if residual else "adapter")
    job, trained_on = _job(config, run, config.sft, rows, "sft", starting_adapter(config, run, "sft"), out, regions)
    _run(job, config.sft, trained_on, "sft", run)
    if residual:
        export_plain(run.adapter, out, run.sft / "adapter", config.model.path)
    return {"examples": trained_on, "steps": steps_in(config.sft, trained_on)}


def warm_up(config: Config, run: RunDirectory, adapter: Path, rows: list[dict[str, Any]]) -> None:
    """A few unmasked steps on both Systems, in place, so that a zero-B adapter can be scored (method, section 2)."""
    settings = config.sft.warmup(config.adapter)
    job, examples = _job(config, run, settings, rows, "warmup", adapter, run.adapter, None)
    _run(job, settings, examples, "warmup", run)


def export_plain(initial: Path, trained: Path, out: Path, original: str) -> None:
    """Write a PiSSA or OLoRA adapter as a plain LoRA of twice the rank on the original base (method, section 4)."""
    from lorapar_ray.adapters import read_adapter_state, to_plain_lora, write_adapter_state

    settings = read_object(trained / "adapter_config.json")
    state, plain = to_plain_lora(read_adapter_state(initial), read_adapter_state(trained), settings)
    write_adapter_state(out, {**plain, "base_model_name_or_path": original}, state)


def _job(
    config: Config,
    run: RunDirectory,
    settings: SftConfig,
    rows: list[dict[str, Any]],
    name: str,
    adapter_in: Path,
    adapter_out: Path,
    regions: Path | None,
) -> tuple[SftJob, int]:
    """The job, and how many rows it trains on."""
    base = base_path(config.model, run)
    encoder = load_encoder(base, config.model.system_prompt, config.model.trust_remote_code)
    examples = run.work / name / "examples.json"
    encoded = encode_rows(encoder, run, rows, stage=name, max_length=settings.max_length, field="sft.max_length")
    train, validation = split_validation(len(encoded), settings.validation, config.seed)
    write_json(examples, {"train": [encoded[i] for i in train], "validation": [encoded[i] for i in validation]})
    job = SftJob(
        name=f"{config.name}-{name}",
        model=config.model.model_dump(mode="json"),
        adapter=config.adapter.model_dump(mode="json"),
        settings=settings.model_dump(mode="json"),
        base=base,
        adapter_in=str(adapter_in.resolve()),
        adapter_out=str(adapter_out.resolve()),
        examples=str(examples.resolve()),
        regions=None if regions is None else str(regions.resolve()),
        checkpoints=str((run.work / name / "checkpoints").resolve()),
        metrics=str((run.metrics / f"{name}.jsonl").resolve()),
        workers=settings.workers,
        seed=config.seed,
    )
    return job, len(train)


def _run(job: SftJob, settings: SftConfig, examples: int, name: str, run: RunDirectory) -> None:
    total = steps_in(settings, examples)
    with progress(name, total, lambda: _poll(Path(job.metrics))):
        run_workers(
            train_worker,
            job.payload(),
            name=name,
            workers=settings.workers,
            resources=settings.resources,
            storage=run.work / "ray",
        )
    shutil.rmtree(job.checkpoints, ignore_errors=True)


def _poll(metrics: Path) -> tuple[int, str]:
    last = last_line(metrics)
    if not last:
        return 0, "starting workers"
    return last["step"], f"loss {last['loss']:.3f} · {last['tokens_per_s']:.0f} tokens/s"
