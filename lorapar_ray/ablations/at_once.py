"""Trains runs of a grid together on one base, and evaluates them on one set of engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import ceil

from lorapar_ray.ablations.sharing import SHARED
from lorapar_ray.ablations.units import Unit
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.job import engines_of, evaluate_together
from lorapar_ray.pipeline import PIPELINE, is_done, run_together
from lorapar_ray.progress import console
from lorapar_ray.sft.together import shape_of, train_together, why_alone
from lorapar_ray.standing import inputs_of
from lorapar_ray.text import one_line


def batches(units: Sequence[Unit]) -> list[list[Unit]]:
    """The units in the order of their runs; units whose stage 1 trains together are in one list.

    Units of one shape are spread evenly over as few lists as `sft.arms_at_once` allows.
    """
    shapes = [_shape(unit) for unit in units]
    count = Counter(shapes)
    made: list[list[Unit]] = []
    filling: dict[str, list[Unit]] = {}
    for unit, shape in zip(units, shapes, strict=True):
        if shape is None:
            made.append([unit])
            continue
        lists = ceil(count[shape] / unit.config.sft.arms_at_once)
        if shape not in filling or len(filling[shape]) == ceil(count[shape] / lists):
            filling[shape] = []
            made.append(filling[shape])
        filling[shape].append(unit)
    return made


def alone_because(units: Sequence[Unit]) -> Iterator[tuple[str, str]]:
    """(arm, reason) for arms whose stage 1 cannot share a base with any other run, each arm once."""
    count = Counter(map(_shape, units))
    whys: dict[str, str] = {}
    for unit in units:
        if "sft" in unit.stages and unit.config.sft.arms_at_once > 1:
            why = why_alone(unit.config)
            if why is None and count[_shape(unit)] == 1:
                why = "no other run has its rank, targets and batches"
            if why is not None:
                whys.setdefault(unit.arm, why)
    yield from whys.items()


def _shape(unit: Unit) -> str | None:
    alone = unit.config.sft.arms_at_once == 1 or "sft" not in unit.stages or why_alone(unit.config) is not None
    return None if alone else shape_of(unit.config)


def run_at_once(units: Sequence[Unit], stage: str) -> None:
    """Run stage `sft` or `evaluate` of several runs together, as far as possible.

    If several runs have equal inputs of stage 1, only one trains, and the others may copy it.

    If a group fails, each of its runs continues alone from the group's checkpoints, and only the run that caused the
    failure fails.
    """
    groups: dict[str, dict[str, Unit]] = {}
    for unit in units:
        if stage in unit.stages and not is_done(unit.config, unit.run, stage):
            group = groups.setdefault(_alike(unit, stage), {})
            group.setdefault(_equal(unit, stage), unit)
    for group in groups.values():
        if len(group) > 1:
            _run_group(list(group.values()), stage)


def _alike(unit: Unit, stage: str) -> str:
    return shape_of(unit.config) if stage == "sft" else engines_of(unit.config)


def _equal(unit: Unit, stage: str) -> str:
    if stage not in SHARED:
        return unit.title
    return str(inputs_of(PIPELINE[stage], unit.config, unit.run.manifest()["stages"], unit.run.fingerprints))


def _run_group(units: Sequence[Unit], stage: str) -> None:
    console.print(f"{stage} of {len(units)} runs at once: " + "; ".join(unit.title for unit in units))
    members = [(unit.config, unit.run) for unit in units]
    try:
        run_together(stage, members, train_together if stage == "sft" else evaluate_together)
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        console.print(f"  not together, but one after the other: {kind}{one_line(error, 300)}")
