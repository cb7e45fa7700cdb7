"""Runs a grid: shared parts are computed once, and a failed run does not stop the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from lorapar_ray.ablations.at_once import AT_ONCE, alone_because, batches, redo_of, run_at_once
from lorapar_ray.ablations.plan import Plan
from lorapar_ray.ablations.report import PAGE, chosen_rates, report
from lorapar_ray.ablations.retention import require_skills_of
from lorapar_ray.ablations.sharing import SHARED, borrow, borrow_sums
from lorapar_ray.ablations.units import Unit, evaluating, run_folders
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import check_there
from lorapar_ray.progress import console
from lorapar_ray.redact import redact
from lorapar_ray.running import NeedsRedo, run_stage
from lorapar_ray.session import ray_session
from lorapar_ray.text import one_line


def run_plan(plan: Plan, *, verbose: bool = False) -> list[str]:
    """Run unfinished units, and write the tables.

    Returns:
        a line for each run that failed.
    """
    failed: list[str] = []
    plan.out.mkdir(parents=True, exist_ok=True)
    for _ in _run_all(lambda: plan.sweeps, plan, failed, verbose):
        pass
    rates = chosen_rates(plan)
    for arm in plan.arms:
        if plan.swept and arm.name not in rates:
            console.print(f"{arm.name}: its sweep is not finished, so its learning rate is unknown and it is skipped")

    for _ in _run_all(lambda: plan.compared(rates), plan, failed, verbose):
        report(plan, failed)
    _evaluate_base(plan, rates, failed, verbose)
    console.print(report(plan, failed))
    console.print(f"the page: {plan.out / PAGE}")
    return failed


def _run_all(look: Callable[[], list[Unit]], plan: Plan, failed: list[str], verbose: bool) -> Iterator[None]:
    """Run unfinished units, those last whose rank follows from the others' masks; yields after each batch of runs.

    Args:
        look: the units, with what is known by now.
    """
    units = look()
    if not all(unit.finished for unit in units):
        for name, why in alone_because(units):
            console.print(f"{name} trains alone: {why}")
    yield from _run_due([unit for unit in units if not unit.waits_for], plan, failed, verbose)
    waited = {unit.title for unit in units if unit.waits_for}
    if waited:
        later = [unit for unit in look() if unit.title in waited]
        for unit in (each for each in later if each.waits_for):
            _fail(
                unit, f"has as many elements as {unit.waits_for} trains, and that is not known: its run failed", failed
            )
        yield from _run_due([unit for unit in later if not unit.waits_for], plan, failed, verbose)


def _evaluate_base(plan: Plan, rates: dict[str, float], failed: list[str], verbose: bool) -> None:
    """Evaluate the base with a finished run, if the one that was to do so has failed."""
    finished = [unit for unit in plan.compared(rates) if unit.finished]
    if not finished or any("base" in unit.config.evaluated for unit in finished):
        return
    instead = evaluating(finished[0], plan.grid.every_stage, base=True)
    console.print(f"{instead.title} evaluates the base too, since the run that was to do so failed")
    with ray_session(verbose):
        _run_part(instead, ["evaluate"], plan, failed)


def _run_due(units: Sequence[Unit], plan: Plan, failed: list[str], verbose: bool) -> Iterator[None]:
    due = [unit for unit in units if not unit.finished]
    with ray_session(verbose) if due else nullcontext():
        for unit in due:
            _check_there(unit)
        done = 0
        for group in batches(due):
            console.print(
                f"[{done + 1}–{done + len(group)}/{len(due)}]" if len(group) > 1 else f"[{done + 1}/{len(due)}]"
            )
            done += len(group)
            _run_batch(group, plan, failed)
            yield


def _check_there(unit: Unit) -> None:
    """The checks that need the student.

    Raises:
        UserError: names the arm that cannot work with it.
    """
    try:
        check_there(unit.config, unit.stages)
    except UserError as error:
        raise UserError(f"arm {unit.arm}: {error}") from error


def _run_batch(units: Sequence[Unit], plan: Plan, failed: list[str]) -> None:
    """Run the units' stages, those of `AT_ONCE` together; later stages leave out a unit that failed."""
    parts = {unit.title: unit.parts(AT_ONCE if len(units) > 1 else ()) for unit in units}
    going = list(units)
    for number in range(max(map(len, parts.values()))):
        due = [unit for unit in going if number < len(parts[unit.title])]
        if number:
            firsts = {unit.title: parts[unit.title][number][0] for unit in due}
            for stage in dict.fromkeys(firsts.values()):
                run_at_once([unit for unit in due if firsts[unit.title] == stage], stage, run_folders(plan.out))
        lost = [unit for unit in due if not _run_part(unit, parts[unit.title][number], plan, failed)]
        going = [unit for unit in going if unit not in lost]


def _run_part(unit: Unit, stages: Sequence[str], plan: Plan, failed: list[str]) -> bool:
    """Run some stages of a unit; returns whether they finished. An error is recorded, and other arms continue."""
    if not stages:
        return True
    console.print(unit.title)
    try:
        unit.run.open(unit.config)
        _run(unit, plan, stages)
    except NeedsRedo as error:  # this command has no --redo
        said = one_line(f"{error.found}; remove '{unit.folder}' to train it again, or choose another --out", 400)
    except UserError as error:
        said = one_line(error, 300).replace("choose another --run-dir", "choose another --out")
    except Exception as error:  # a bug of this project or of a library
        file = plan.out / "failures" / f"{unit.folder.name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(redact(traceback.format_exc()), encoding="utf-8")
        said = f"{type(error).__name__}: {one_line(error, 200)} (the full error is in '{file}')"
    else:
        return True
    _fail(unit, said, failed)
    return False


def _fail(unit: Unit, why: str, failed: list[str]) -> None:
    failed.append(f"{unit.title}: {why}")
    console.print(f"  {failed[-1]}")


def _run(unit: Unit, plan: Plan, stages: Sequence[str]) -> None:
    siblings = run_folders(plan.out)
    for name in stages:
        _run_stage(unit, name, siblings)
        if name == "label" and plan.grid.lines:
            require_skills_of(unit.run.labels, unit.config)


def _run_stage(unit: Unit, name: str, siblings: list[Path]) -> None:
    run = unit.run
    if name in SHARED and borrow(unit.config, run, name, siblings):
        console.print(f"  {name} is a copy")
        return
    if name == "score" and borrow_sums(unit.config, run, siblings):
        console.print("  score uses the sums of a run with another criterion")
    run_stage(unit.config, run, name, redo_of(name))
