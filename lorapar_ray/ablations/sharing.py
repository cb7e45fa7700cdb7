"""Copies a stage from a sibling run that has finished it with the same inputs."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorapar_ray.ablations.units import CRITERION, OWN_CUT
from lorapar_ray.boundary import read_tensors
from lorapar_ray.config import Config
from lorapar_ray.partition.regions import mask_digest
from lorapar_ray.pipeline import PIPELINE, is_done
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import OUTPUTS_FOR
from lorapar_ray.standing import inputs_of, recorded_inputs

SHARED = ("label", "score", "partition", "sft", "grpo")
"""Evaluation is of one run."""


def borrow(config: Config, run: RunDirectory, stage: str, siblings: list[Path]) -> bool:
    """Copy `stage` from the first of `siblings` that has finished it with the same inputs; returns whether one had.

    For a training stage a cut counts as the same if it lets the stage train the same elements: stage 1 is the same run
    for every β.
    """
    if is_done(config, run, stage):
        return False
    own = inputs_of(PIPELINE[stage], config, run.manifest()["stages"], run.fingerprints)
    wanted = read_by(stage, config, run, own)
    for sibling in siblings:
        other = RunDirectory(sibling)
        stages = other.manifest().get("stages", {})
        entry = stages.get(stage, {})
        if other.root == run.root or entry.get("status") != "done":
            continue
        if entry.get("inputs") == own or (
            _of_its_cut(stage, entry, stages) and read_by(stage, config, other, entry["inputs"]) == wanted
        ):
            for place in (*PIPELINE[stage].outputs, *PIPELINE[stage].traces):
                _copy(other.root / place, run.root / place)
            run.record(stage, **{**entry, "inputs": own})
            return True
    return False


def read_by(stage: str, config: Config, run: RunDirectory, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a stage of a run with, for a training stage, only what it reads of the cut: its own mask."""
    file = run.partition / "regions.safetensors"
    if stage not in OWN_CUT or not file.is_file():
        return inputs
    masked = getattr(config, stage).masked
    own = _mask(file, OWN_CUT[stage].bit, file.stat().st_mtime_ns) if masked else "every element"
    return {**inputs, "sources": {**inputs["sources"], "partition": own}}


def _of_its_cut(stage: str, entry: dict[str, Any], stages: dict[str, Any]) -> bool:
    """Whether a training stage was made with the cut that its run has now."""
    if stage not in OWN_CUT:
        return False
    made_with, cut = recorded_inputs(entry).get("sources", {}).get("partition"), stages.get("partition", {})
    return made_with is not None and made_with in (cut.get("outputs"), cut.get(OUTPUTS_FOR, {}).get(stage))


@lru_cache(maxsize=256)
def _mask(file: Path, bit: int, _written_ns: int) -> str:
    """A digest of the elements with a bit."""
    return mask_digest(read_tensors(file), bit)


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
        if entry.get("status") == "done" and _summed(recorded_inputs(entry)) == _summed(wanted) and _has_sums(other):
            for place in ("adapter", *stage.scratch):
                _copy(other.root / place, run.root / place)
            run.record(stage.name, status="started", inputs=wanted, seconds=0.0)
            return True
    return False


def _summed(inputs: dict[str, Any]) -> dict[str, Any]:
    """What decides the sums: everything but the criterion."""
    return {**inputs, "settings": {**inputs.get("settings", {}), CRITERION: None}}


def _has_sums(run: RunDirectory) -> bool:
    """Whether the run's scratch files have not been deleted."""
    return any((run.work / "score").glob("sums-*"))


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
