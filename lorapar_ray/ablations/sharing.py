"""Copies a stage from a sibling run that has finished it with the same inputs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorapar_ray.ablations.units import CRITERION, OWN_CUT
from lorapar_ray.boundary import read_tensors
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.files import is_of_a_full_disk, no_space
from lorapar_ray.partition.regions import mask_digest
from lorapar_ray.pipeline import PIPELINE, is_done
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import OUTPUTS_FOR
from lorapar_ray.standing import damage_of, inputs_of, recorded_inputs

SHARED = ("label", "score", "partition", "sft", "grpo")
"""Evaluation is of one run."""


def borrow(config: Config, run: RunDirectory, stage: str, siblings: list[Path]) -> bool:
    """Copy `stage` from the first of `siblings` that has finished it with the same inputs, and is undamaged; returns
    whether there was one.

    For a training stage a cut counts as the same if it lets the stage train the same elements: stage 1 is the same run
    for every β.

    Raises:
        UserError: no space is left on the disk.
    """
    if is_done(config, run, stage):
        return False
    own = inputs_of(PIPELINE[stage], config, run.manifest()["stages"], run.fingerprints)
    wanted = read_by(stage, config, run, own)
    for sibling in siblings:
        other = RunDirectory(sibling)
        entry = _same(config, other, stage, own, wanted) if other.root != run.root else None
        if entry is not None:
            _copy(other, run, (*PIPELINE[stage].outputs, *PIPELINE[stage].traces))
            run.record(stage, **{**entry, "inputs": own})
            return True
    return False


def _same(
    config: Config, other: RunDirectory, stage: str, own: dict[str, Any], wanted: dict[str, Any]
) -> dict[str, Any] | None:
    """The entry of a sibling's finished stage, if it has the inputs `own` or reads the same of its inputs, and is
    undamaged."""
    try:
        stages = other.manifest().get("stages", {})
        entry: dict[str, Any] = stages.get(stage, {})
        if entry.get("status") != "done":
            return None
        same = entry.get("inputs") == own or (
            _of_its_cut(stage, entry, stages) and read_by(stage, config, other, entry["inputs"]) == wanted
        )
        return entry if same and not any(damage_of(other, entry, other.fingerprints)) else None
    except (UserError, OSError):  # the sibling reports it, if it is one of the grid's runs
        return None


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
        if _has_sums_of(other, wanted):
            _copy(other, run, ("adapter", *stage.scratch))
            run.record(stage.name, status="started", inputs=wanted, seconds=0.0)
            return True
    return False


def _summed(inputs: dict[str, Any]) -> dict[str, Any]:
    """What decides the sums: everything but the criterion."""
    return {**inputs, "settings": {**inputs.get("settings", {}), CRITERION: None}}


def _has_sums_of(run: RunDirectory, wanted: dict[str, Any]) -> bool:
    """Whether an undamaged run has scored with these inputs but for the criterion, and still has its scratch files."""
    try:
        entry = run.entry("score")
        same = entry.get("status") == "done" and _summed(recorded_inputs(entry)) == _summed(wanted)
        return same and any((run.work / "score").glob("sums-*")) and not any(damage_of(run, entry, run.fingerprints))
    except (UserError, OSError):
        return False


def _copy(source: RunDirectory, target: RunDirectory, places: Sequence[str]) -> None:
    """Copy files and folders of a run into another; each file is whole before it takes its place.

    Raises:
        UserError: no space is left on the disk.
    """
    draft = target.work / "copies"
    try:
        for place in places:
            _copy_one(source.root / place, draft / place)
        for file in sorted(each for each in draft.rglob("*") if each.is_file()):
            final = target.root / file.relative_to(draft)
            final.parent.mkdir(parents=True, exist_ok=True)
            file.replace(final)
    except OSError as error:
        if is_of_a_full_disk(error):
            raise no_space(target.root) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy_one(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
