"""Units of scoring work on disk: `work/score/system1/unit-00000.json` holds the examples, `.safetensors` their sums."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.importance.sums import GradSums
from lorapar_ray.runs import RunDirectory, write_json


def write_units(run: RunDirectory, system: int, examples: Sequence[dict[str, Any]], size: int) -> list[Path]:
    """Cut tokenised examples into units of `size`, at least two; returns the units' sums, written or still to be.

    Two, because the control compares the scores of one half of the units with those of the other. Sums of other
    examples, as another `size` cuts them, are taken away.
    """
    size = min(size, -(-len(examples) // 2))
    units = []
    for index, start in enumerate(range(0, len(examples), size)):
        unit = run.work / "score" / f"system{system}" / f"unit-{index:05d}.safetensors"
        _prepare(unit, list(examples[start : start + size]))
        units.append(unit)
    for unit in finished_units(run, system):
        if unit not in units:
            unit.unlink()
    return units


def _prepare(unit: Path, examples: list[dict[str, Any]]) -> None:
    plan = unit.with_suffix(".json")
    try:
        same = json.loads(plan.read_text()) == examples
    except (OSError, ValueError):
        same = False
    if not same:
        unit.unlink(missing_ok=True)
        write_json(plan, examples)


def finished_units(run: RunDirectory, system: int) -> list[Path]:
    """The sums of every finished unit, in order."""
    return sorted((run.work / "score" / f"system{system}").glob("unit-*.safetensors"))


def sum_units(units: Sequence[Path]) -> GradSums:
    """The sums of several units together, added in their order."""
    total = GradSums.load(units[0])
    for unit in units[1:]:
        total.add(GradSums.load(unit))
    return total
