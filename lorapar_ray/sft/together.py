"""Stage 1 of several runs at once: their adapters train on one frozen base, in one group of workers."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.config.base import Section
from lorapar_ray.config.marks import deciding
from lorapar_ray.errors import UserError
from lorapar_ray.files import digest
from lorapar_ray.progress import progress
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.arms_worker import train_arms_worker
from lorapar_ray.sft.job import Part, notes_of, residual, stage1_parts, steps_done, train_part
from lorapar_ray.tracking import notices_of
from lorapar_ray.workers import run_workers

SHARED_ADAPTER = ("rank", "dropout", "targets")
OWN = {
    *("systems", "masked", "learning_rate", "lora_plus_ratio", "schedule", "warmup_ratio", "weight_decay", "betas"),
    *("max_grad_norm", "nonfinite_limit", "keep", "patience", "report_to"),
}
"""Settings of `sft` that may differ between runs that train together."""


def why_alone(config: Config) -> str | None:
    """The setting that prevents a run's stage 1 from sharing a base with other runs; None: it can share."""
    if why := adapter_alone(config):
        return why
    if config.sft.sharding != "none":
        return f"sft.sharding: {config.sft.sharding}"
    return None


def adapter_alone(config: Config) -> str | None:
    """The setting of the adapter that prevents a run from sharing a base with other runs; None: it can share."""
    if config.adapter.method != "lora":
        return f"adapter.method: {config.adapter.method}"
    if config.adapter.init == "adapter":  # it has its own rank and targets
        return f"adapter.init: {config.adapter.init}"
    return None


def shape_of(config: Config) -> str:
    """A digest that is equal for runs whose stage 1 can train together: base, rank, targets, rows of a batch."""
    return stage_shape(config, config.sft, OWN, len(config.sft.parts))


def stage_shape(config: Config, section: Section, own: Collection[str], *equal: Any) -> str:
    """A digest of base, rank, targets, and a training stage's settings without those that are each run's `own`.

    Args:
        equal: further values that must be equal.
    """
    stage = {key: value for key, value in section.model_dump(mode="json").items() if key not in own}
    adapter = {key: getattr(config.adapter, key) for key in SHARED_ADAPTER}
    model = {key: value.value for key, value in deciding(config.model).items()} | {"attention": config.model.attention}
    if residual(config):  # the part that was removed from the base
        adapter |= {"init": config.adapter.init, "alpha": config.adapter.alpha}
        adapter |= {"seed": config.seed} if config.adapter.init == "pissa_fast" else {}
    return digest(json.loads(json.dumps([model, adapter, stage, equal], default=str)))


def train_together(members: Sequence[tuple[Config, RunDirectory]]) -> list[dict[str, Any]]:
    """`train_stage1` of every run; each gets the files that it would get alone.

    Args:
        members: of one `shape_of`, and `why_alone` None.

    Returns: each one's notes for the manifest.

    Raises:
        UserError: as `train_stage1`, of any of them, or their residual bases are not the same.
    """
    made = [stage1_parts(config, run) for config, run in members]
    require_one_base([(run, parts[0].job.base) for (_, run), parts in zip(members, made, strict=True)])
    for number in range(len(made[0])):
        last = number == len(made[0]) - 1
        due = [
            (parts[number], *member)
            for parts, member in zip(made, members, strict=True)
            if last or not parts[number].finished
        ]
        if len(left := [each for each in due if not each[0].trained]) > 1:
            _train_parts(left)
        for each in due:
            train_part(*each)
    return [notes_of(parts) for parts in made]


def _train_parts(due: Sequence[tuple[Part, Config, RunDirectory]]) -> None:
    """The same part of several runs, in one group of workers."""
    parts = [part for part, _, _ in due]
    jobs = [part.job for part in parts]
    _, config, run = due[0]
    steps, metrics = sum(part.steps for part in parts), [job.metrics for job in jobs]
    with progress(f"{parts[0].title} × {len(due)}", steps, lambda: steps_done(*metrics), [*map(notices_of, metrics)]):
        run_workers(
            train_arms_worker,
            {"jobs": [job.payload() for job in jobs]},
            name="sft",
            workers=config.sft.workers,
            max_workers=config.sft.max_workers,
            resources=config.sft.resources,
            run=run,
            writes=[],  # arms are on a shared disk
        )


def require_one_base(bases: Sequence[tuple[RunDirectory, str]]) -> None:
    """Check that runs train on the same base, of which each may have its own copy.

    Raises:
        UserError: the copies differ.
    """
    if len({base for _, base in bases}) == 1:
        return
    if len({run.fingerprints.of_input(base) for run, base in bases}) > 1:
        raise UserError("the residual bases of these runs differ: each trains against its own")
