"""Stage `score`: the adapter, and how much each of its elements matters to each System."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.config.marks import Setting, deciding
from lorapar_ray.processes import Processes, training_workers
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Settings, Stage, model_files, settings_of

WARMUP = (
    *("batch_size", "lora_plus_ratio", "weight_decay", "betas", "max_grad_norm", "max_length", "length_bucketing"),
)
"""Settings of `sft` that the warm-up uses; the others are fixed for it, or do not affect it."""


def run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Make the adapter, warm it up where every score would be zero, and score it."""
    from lorapar_ray.adapters.job import make_adapter
    from lorapar_ray.importance.job import score_stage
    from lorapar_ray.progress import console

    if not config.partitioned:
        console.print("  no stage trains only a region: a new adapter, no scores")
        if config.adapter.method == "lora":
            make_adapter(config, run, run.adapter)
        return {}
    if config.warms_up and not (run.adapter / "adapter_config.json").is_file():
        initial = run.work / "score" / "initial"
        make_adapter(config, run, initial)
        return score_stage(config, run, initial)
    make_adapter(config, run, run.adapter)
    return score_stage(config, run)


def settings(config: Config) -> Settings:
    """Its own settings, whether there is anything to score and for which Systems, and those of stage 1 that the warm-up
    uses."""
    found = settings_of(config, "model", "adapter", "score") | {
        "partitioned": Setting(config.partitioned, False),
        "systems": Setting(config.scored, config.scored == [1, 2]),
    }
    if config.warms_up:
        sft = deciding(config.sft, "sft")
        found |= {f"sft.{name}": sft[f"sft.{name}"] for name in WARMUP}
    return found


def reads(config: Config) -> Iterator[str]:
    """The student, and an adapter to start from."""
    yield from model_files(config.model.path)
    if config.adapter.path is not None:
        yield config.adapter.path


def processes(config: Config) -> Iterator[Processes]:
    """The workers that score; with nothing to score, the one that makes the adapter."""
    if config.partitioned:
        yield training_workers(config.score)
    elif config.adapter.method == "lora":
        yield Processes("workers", "worker", 1, config.score.resources)


def check(config: Config) -> None:
    """The model's dtype has room for gradients."""
    from lorapar_ray.precision import require_trainable

    if config.partitioned:
        require_trainable(config.model.dtype)


def check_there(config: Config) -> None:
    """Trackers of the warm-up have their keys where the workers run."""
    from lorapar_ray.tracker_check import require_keys

    require_keys(config, "score")


STAGE = Stage(
    name="score",
    help="Make the adapter and score each of its elements for every System.",
    needs=lambda _: ("label",),
    settings=settings,
    unused=lambda config: () if config.partitioned else ("score",),
    run=run,
    check=check,
    check_there=check_there,
    outputs=("adapter", "scores"),
    traces=(
        *("rejects/score.parquet", "rejects/warmup.parquet"),
        *("metrics/warmup.jsonl", "metrics/tensorboard/{name}-warmup", "metrics/warmup.trackers.json"),
        "metrics/warmup.notices.txt",
    ),
    scratch=("work/score", "work/warmup"),
    reads=reads,
    processes=processes,
    uses_ray=lambda config: config.partitioned or config.adapter.method == "lora",
)
