"""Copies a stage from a sibling run that has finished it with the same inputs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lorapar_ray.ablations.units import CRITERION
from lorapar_ray.config import Config
from lorapar_ray.pipeline import PIPELINE, is_done
from lorapar_ray.runs import RunDirectory
from lorapar_ray.standing import inputs_of

SHARED = ("label", "score", "partition", "sft", "grpo")
"""Evaluation is of one run."""


def borrow(config: Config, run: RunDirectory, stage: str, siblings: list[Path]) -> bool:
    """Copy `stage` from the first of `siblings` that has finished it with the same inputs; returns whether one had."""
    if is_done(config, run, stage):
        return False
    wanted = inputs_of(PIPELINE[stage], config, run.manifest()["stages"], run.fingerprints)
    for sibling in siblings:
        other = RunDirectory(sibling)
        entry = other.manifest().get("stages", {}).get(stage, {})
        if other.root != run.root and entry.get("status") == "done" and entry.get("inputs") == wanted:
            for place in (*PIPELINE[stage].outputs, *PIPELINE[stage].traces):
                _copy(other.root / place, run.root / place)
            run.record(stage, **entry)
            return True
    return False


def borrow_sums(config: Config, run: RunDirectory, siblings: list[Path]) -> bool:
    """Copy the gradients' sums from a sibling that has scored with another criterion and otherwise the same inputs.

    Stage `score` then begins where it only computes the scores. Returns whether there was such a sibling.
    """
    stage = PIPELINE["score"]
    if not config.partitioned or run.entry(stage.name):
        return False
    wanted = inputs_of(stage, config, run.manifest()["stages"], run.fingerprints)
    for sibling in siblings:
        other = RunDirectory(sibling)
        entry = other.manifest().get("stages", {}).get(stage.name, {})
        if entry.get("status") == "done" and _summed(entry["inputs"]) == _summed(wanted) and _has_sums(other):
            for place in ("adapter", *stage.scratch):
                _copy(other.root / place, run.root / place)
            run.record(stage.name, status="started", inputs=wanted, seconds=0.0)
            return True
    return False


def _summed(inputs: dict[str, Any]) -> dict[str, Any]:
    """What decides the sums: everything but the criterion."""
    return {**inputs, "settings": {**inputs["settings"], CRITERION: None}}


def _has_sums(run: RunDirectory) -> bool:
    """Whether the run's scratch files have not been deleted."""
    return any((run.work / "score").glob("sums-*"))


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
