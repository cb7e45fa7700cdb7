"""Trains runs of a grid together on one base, and evaluates them on one set of engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path

from lorapar_ray.ablations.sharing import SHARED, borrow, read_by
from lorapar_ray.ablations.units import Unit, shared_keys
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.job import engines_of, evaluate_together
from lorapar_ray.grpo import together as stage2
from lorapar_ray.pipeline import PIPELINE, is_done
from lorapar_ray.progress import console
from lorapar_ray.running import Redo, run_together
from lorapar_ray.sft import together as stage1
from lorapar_ray.standing import inputs_of
from lorapar_ray.text import one_line


def batches(units: Sequence[Unit]) -> list[list[Unit]]:
    """The units in the order of their runs; units whose stage 1 trains together, or is the same, are in one list.

    Stages 1 of one shape are spread evenly over as few lists as `sft.arms_at_once` allows.
    """
    shapes, keys = [_shape(unit) for unit in units], [stage1_key(unit) for unit in units]
    count = Counter(shape for shape, _ in set(zip(shapes, keys, strict=True)))
    made: list[list[Unit]] = []
    filling: dict[str, tuple[list[Unit], set[str]]] = {}
    """By shape, the list that is filling, and its stages 1."""
    of_key: dict[str, list[Unit]] = {}
    for unit, shape, key in zip(units, shapes, keys, strict=True):
        if shape is None:
            made.append([unit])
        elif key in of_key:
            of_key[key].append(unit)
        else:
            lists = ceil(count[shape] / unit.config.sft.arms_at_once)
            if shape not in filling or len(filling[shape][1]) == ceil(count[shape] / lists):
                made.append([])
                filling[shape] = made[-1], set()
            filling[shape][0].append(unit)
            filling[shape][1].add(key)
            of_key[key] = filling[shape][0]
    return made


def alone_because(units: Sequence[Unit]) -> Iterator[tuple[str, str]]:
    """(stage of an arm, reason) where it cannot share a base with any other run, each arm once."""
    count = Counter(map(_shape, units))
    whys: dict[str, str] = {}
    for unit in units:
        if "sft" in unit.stages and unit.config.sft.arms_at_once > 1:
            why = stage1.why_alone(unit.config)
            if why is None and count[_shape(unit)] == 1:
                why = "no other run has its rank, targets and batches"
            if why is not None:
                whys.setdefault(f"stage 1 of {unit.arm}", why)
        if "grpo" in unit.stages and unit.config.grpo.arms_at_once > 1 and (why := stage2.why_alone(unit.config)):
            whys.setdefault(f"stage 2 of {unit.arm}", why)
    yield from whys.items()


def stage1_key(unit: Unit) -> str:
    """Equal for units that share stage 1."""
    return shared_keys(unit).get("sft", unit.title)


def _shape(unit: Unit) -> str | None:
    alone = unit.config.sft.arms_at_once == 1 or "sft" not in unit.stages or stage1.why_alone(unit.config) is not None
    return None if alone else stage1.shape_of(unit.config)


def run_at_once(units: Sequence[Unit], stage: str, siblings: list[Path]) -> None:
    """Run one of `AT_ONCE`'s stages of several runs together, as far as possible.

    A run copies a training stage from one of `siblings` that has finished it with the same inputs. If several runs have
    equal inputs, only one trains, and the others may copy it.

    If a group fails, each of its runs continues alone from the group's checkpoints, and only the run that caused the
    failure fails. A run that cannot be copied or read is left out: it meets the same error alone, where it is recorded.
    """
    due: dict[str, Unit] = {}
    for unit in units:
        try:
            if stage in SHARED and borrow(unit.config, unit.run, stage, siblings):
                console.print(f"{unit.title}: {stage} is a copy")
            elif not is_done(unit.config, unit.run, stage):
                due.setdefault(_equal(unit, stage), unit)
        except Exception as error:
            console.print(f"{unit.title}: {stage} not together with others: {_said(error)}")
    for group in groups_of(list(due.values()), stage):
        if len(group) > 1:
            _run_group(group, stage)


def groups_of(units: Sequence[Unit], stage: str) -> list[list[Unit]]:
    """The units of a batch whose `stage` can run together, in as few groups as the config allows."""
    alike: dict[str, list[Unit]] = {}
    for unit in units:
        if stage in unit.stages and (stage != "grpo" or stage2.why_alone(unit.config) is None):
            alike.setdefault(_ALIKE[stage](unit.config), []).append(unit)
    groups = []
    for same in alike.values():
        most = len(same) if stage == "evaluate" else getattr(same[0].config, stage).arms_at_once
        size = ceil(len(same) / ceil(len(same) / most))
        groups += [same[start : start + size] for start in range(0, len(same), size)]
    return groups


def _equal(unit: Unit, stage: str) -> str:
    if stage not in SHARED:
        return unit.title
    own = inputs_of(PIPELINE[stage], unit.config, unit.run.manifest()["stages"], unit.run.fingerprints)
    return str(read_by(stage, unit.config, unit.run, own))


def redo_of(stage: str) -> Redo:
    """What may be replaced: an evaluation of other models or tasks, as an earlier version or plan asked for, but never
    what was trained."""
    return "if_changed" if stage == "evaluate" else "no"


def _run_group(units: Sequence[Unit], stage: str) -> None:
    console.print(f"{stage} of {len(units)} runs at once: " + "; ".join(unit.title for unit in units))
    members = [(unit.config, unit.run) for unit in units]
    try:
        run_together(stage, members, _WORK[stage], redo_of(stage))
    except Exception as error:
        console.print(f"  not together, but one after the other: {_said(error)}")


def _said(error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error, 300)}"


_ALIKE = {"sft": stage1.shape_of, "grpo": stage2.shape_of, "evaluate": engines_of}
"""Runs with an equal value can run the stage together."""
_WORK = {"sft": stage1.train_together, "grpo": stage2.train_together, "evaluate": evaluate_together}
AT_ONCE = tuple(_WORK)
"""Stages that run for several runs together."""
