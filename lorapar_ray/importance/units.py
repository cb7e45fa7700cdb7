"""What earlier versions left of scoring: the sums of each unit, `work/score/system1/unit-00000.safetensors`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorapar_ray.importance.sums import GradSums
from lorapar_ray.runs import RunDirectory


def finished_units(run: RunDirectory, system: int) -> list[Path]:
    """The sums of every finished unit, in order."""
    return sorted((run.work / "score" / f"system{system}").glob("unit-*.safetensors"))


def sum_units(units: Sequence[Path]) -> GradSums:
    """The sums of several units together, added in their order."""
    total = GradSums.load(units[0])
    for unit in units[1:]:
        total.add(GradSums.load(unit))
    return total
