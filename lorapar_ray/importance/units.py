"""Scoring's partial results of earlier versions: the sums of each unit, `work/score/system1/unit-00000.safetensors`."""

from __future__ import annotations

from pathlib import Path

from lorapar_ray.runs import RunDirectory


def finished_units(run: RunDirectory, system: int) -> list[Path]:
    """The sums of every finished unit, in order."""
    return sorted((run.work / "score" / f"system{system}").glob("unit-*.safetensors"))
