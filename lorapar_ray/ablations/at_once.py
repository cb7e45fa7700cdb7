"""Which runs of a grid train on one base and are evaluated by one set of engines, and that they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    """The units in the order in which they run, those whose stage 1 trains together in one list."""
    made: list[list[Unit]] = []
    filling: dict[str, list[Unit]] = {}
    for unit in units:
        most = unit.config.sft.arms_at_once
        if most == 1 or "sft" not in unit.stages or why_alone(unit.config):
            made.append([unit])
            continue
        shape = shape_of(unit.config)
        if len(filling.get(shape, ())) in (0, most):
            filling[shape] = []
            made.append(filling[shape])
        filling[shape].append(unit)
    return made


def alone_because(units: Sequence[Unit]) -> Iterator[tuple[str, str]]:
    """(arm, why) for arms whose stage 1 cannot share a base with any other's, each arm once."""
    whys = {unit.arm: why for unit in units if "sft" in unit.stages and (why := why_alone(unit.config))}
    own = [group[0] for group in batches(units) if len(group) == 1 and group[0].arm not in whys]
    for unit in own:
        if "sft" in unit.stages and unit.config.sft.arms_at_once > 1:
            whys[unit.arm] = "no other run is left of its rank, targets and batches"
    yield from whys.items()


def run_at_once(units: Sequence[Unit], stage: str) -> None:
    """Run stage `sft` or `evaluate` of several runs together, as far as they can.

    Of runs whose stage 1 has equal inputs one trains, which the others may copy.

    A group that cannot end is no failure yet: each of its runs then goes on alone, from where the group came to, and
    the one that was the reason says so itself.
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
        console.print(f"  not at once, but one after the other: {kind}{one_line(error, 300)}")
