"""The work of a grid before it runs: optimiser steps, and the devices that each stage holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil
from pathlib import Path

import pyarrow.parquet as pq

from lorapar_ray.ablations.units import Unit
from lorapar_ray.boundary import damaged
from lorapar_ray.config import Config
from lorapar_ray.gpu_memory.device import device_of
from lorapar_ray.gpus import place
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.sft.batches import steps_in, validation_rows

TRAINED = ("sft", "grpo")


def steps_of(unit: Unit, stage: str) -> int | None:
    """The most optimiser steps of a training stage; None: its rows are not known before they are read."""
    config = unit.config
    if stage == "grpo":
        if config.grpo.steps is not None:
            return config.grpo.steps
        rows = _rows(unit, config.grpo.systems)
        return None if rows is None else ceil(rows / config.grpo.prompts_per_step)
    if config.sft.max_steps is not None:
        return config.sft.max_steps * len(config.sft.parts)
    total = 0
    for systems in config.sft.parts:
        rows = _rows(unit, systems)
        if rows is None:
            return None
        total += steps_in(config.sft, rows - validation_rows(rows, config.sft.validation))
    return total


def held_out_rows(unit: Unit) -> int | None:
    """The rows that a run of stage 1 holds out for its validation loss, at most; None: its rows are not known yet."""
    config, total = unit.config, 0
    for systems in config.sft.parts:
        rows = _rows(unit, systems)
        if rows is None:
            return None
        total += validation_rows(rows, config.sft.validation)
    return total


def steps_of_all(units: Sequence[Unit], stage: str) -> int | None:
    """The sum over runs; None if one is not known."""
    found = [steps_of(unit, stage) for unit in units]
    known = [each for each in found if each is not None]
    return sum(known) if len(known) == len(found) else None


def of_rows(units: Sequence[Unit], stage: str) -> str:
    """How the steps follow from rows that are not known yet."""
    sizes = {each.config.sft.batch_size if stage == "sft" else each.config.grpo.prompts_per_step for each in units}
    passes = {each.config.sft.epochs if stage == "sft" else 1.0 for each in units}
    every, epochs = (" or ".join(f"{each:g}" for each in sorted(found)) for found in (sizes, passes))
    return f"an optimiser step for every {every} rows, {epochs} epoch{'s' if max(passes) != 1 else ''}"


def _rows(unit: Unit, systems: Collection[int]) -> int | None:
    """The rows of some Systems: as labelled, else at most those of the sources."""
    if files := sorted(unit.run.labels.glob("*.parquet")):
        return sum(_labelled(file, systems) for file in files)
    by_source = unit.config.label.strategy == "source"
    counts = [each.rows for each in unit.config.data.train if not by_source or each.system in systems]
    known = [each for each in counts if each is not None]
    return sum(known) if len(known) == len(counts) else None


def _labelled(file: Path, systems: Collection[int]) -> int:
    with damaged(file):
        labels: list[int] = pq.read_table(file, columns=["system"]).column("system").to_pylist()
    return sum(each in systems for each in labels)


def devices_of(config: Config, stage: str) -> tuple[str, float]:
    """What a stage holds while it runs: ("GPU", number), or ("core", number) if it asks for no GPU."""
    groups = PIPELINE[stage].groups(place(config, stage, device_of(config).count)).values()
    gpus = sum(count * each.gpu_count for count, each in groups)
    return ("GPU", gpus) if gpus else ("core", sum(count * each.cpus for count, each in groups) or 1.0)
