"""Units of scoring work on disk: `work/score/system1/unit-00000.json` holds the examples, `.safetensors` their sums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.importance.sums import GradSums
from lorapar_ray.runs import RunDirectory, write_json


def write_units(run: RunDirectory, system: int, examples: Sequence[dict[str, Any]], size: int) -> list[Path]:
    """Cut tokenised examples into units of `size`, at least two; returns the units' sums, written or still to be.

    Two, because the control compares the scores of one half of the units with those of the other.
    """
    size = min(size, -(-len(examples) // 2))
    units = []
    for index, start in enumerate(range(0, len(examples), size)):
        unit = run.work / "score" / f"system{system}" / f"unit-{index:05d}.safetensors"
        if not unit.is_file():
            write_json(unit.with_suffix(".json"), list(examples[start : start + size]))
        units.append(unit)
    return units


def finished_units(run: RunDirectory, system: int) -> list[Path]:
    """The sums of every finished unit, in order."""
    return sorted((run.work / "score" / f"system{system}").glob("unit-*.safetensors"))


def sum_units(units: Sequence[Path]) -> GradSums:
    """The sums of several units together, added in their order."""
    total = GradSums.load(units[0])
    for unit in units[1:]:
        total.add(GradSums.load(unit))
    return total
