"""Copies a stage from a sibling run that has finished it with the same inputs."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorapar_ray.config import Config
from lorapar_ray.pipeline import PIPELINE, is_done
from lorapar_ray.runs import RunDirectory
from lorapar_ray.standing import inputs_of

SHARED = ("label", "score", "partition", "sft")
"""Stage 2 and evaluation differ between runs."""


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


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
