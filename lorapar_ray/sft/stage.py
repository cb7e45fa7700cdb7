"""Stage `sft`, stage 1 of the method: the System 1 region on System 1 rows."""

from __future__ import annotations

from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.processes import training_workers
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Stage, before, model_files, order_until, settings_of


def run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Train."""
    from lorapar_ray.sft.job import train_stage1

    return train_stage1(config, run)


def check(config: Config) -> None:
    """Trackers are installed, and the model's dtype can be trained in."""
    from lorapar_ray.precision import require_trainable
    from lorapar_ray.tracking import require_trackers

    require_trainable(config.model.dtype)
    require_trackers(config.sft.report_to, "sft.report_to")


def check_there(config: Config) -> None:
    """Trackers have their keys where the workers run."""
    from lorapar_ray.tracker_check import require_keys

    require_keys(config, "sft")


STAGE = Stage(
    name="sft",
    help="Stage 1: masked SFT on System 1 rows.",
    needs=lambda config: before(config, "sft"),
    settings=lambda config: settings_of(config, "model", "adapter", "sft") | order_until(config, "sft"),
    unused=lambda config: () if config.sft.validation else ("sft.validate_every", "sft.keep"),
    run=run,
    outputs=("sft",),
    traces=(
        *("rejects/sft.parquet", "metrics/sft.jsonl", "metrics/sft_validation.jsonl", "metrics/sft"),
        *("metrics/tensorboard/{name}-sft", "metrics/sft.trackers.json", "metrics/sft.notices.txt"),
    ),
    scratch=("work/sft",),
    reads=lambda config: model_files(config.model.path),
    processes=lambda config: [training_workers(config.sft)],
    check=check,
    check_there=check_there,
)
