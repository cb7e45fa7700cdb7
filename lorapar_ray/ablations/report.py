"""The tables and the page of a grid's finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorapar_ray.ablations import movement, retention, sequence, stronger, tables
from lorapar_ray.ablations.equal_gain import compare
from lorapar_ray.ablations.grid import Claim
from lorapar_ray.ablations.movement import Overlap
from lorapar_ray.ablations.paper import figures_of
from lorapar_ray.ablations.plan import Plan
from lorapar_ray.ablations.results import (
    Outcome,
    Overall,
    Summary,
    Verdict,
    decide,
    read_outcome,
    sum_up,
    summarise,
    validation_loss,
)
from lorapar_ray.ablations.retention import Point, read_point
from lorapar_ray.ablations.sequence import Course, read_course
from lorapar_ray.ablations.stronger import Stronger
from lorapar_ray.ablations.tables import Said
from lorapar_ray.ablations.units import Unit
from lorapar_ray.ablations.verdicts import Uncompared
from lorapar_ray.ablations.work import held_out_rows
from lorapar_ray.files import atomic_path

PAGE = "index.html"
XML = '<?xml version="1.0" encoding="utf-8"?>\n'


@dataclass(frozen=True)
class Compared:
    """A grid's arms on one set of questions: the test rows, or a task of lm-eval."""

    base: Summary | None
    arms: dict[str, Summary]
    verdicts: list[Verdict]
    overall: list[Overall]
    """Verdicts on several of `verdicts` together."""
    missing: list[Uncompared]
    """Claims of which nothing can be compared."""
    said: list[Overall]
    """All of them, with the questions' name."""
    table: tables.Table


def report(plan: Plan, failed: Sequence[str] = ()) -> str:
    """Write the tables and the page of finished runs; returns the table as Markdown."""
    from lorapar_ray.ablations import charts
    from lorapar_ray.ablations.page import write_page

    rates = chosen_rates(plan)
    ends = plan.ends(rates)
    done = [unit for unit in plan.compared(rates) if unit.finished]
    every = plan.units({})
    config = every[0].config
    asked, claims = plan.asked, plan.comparisons
    sweep = _sweep(plan) if done else ""
    main, *others = [_compared(plan, done, task, ends, sweep) for task in asked]
    table = replace(main.table, name="table")
    lines, courses = _lines(plan, done), _courses(plan, done)
    begun = bool(done)  # before that no claim has a verdict
    arms = plan.arms_of_lines
    kept = [compare(claim, lines, arms, plan.seeds, claims) for claim in plan.line_claims if begun]
    sequences = filter(plan.compares, plan.grid.sequence)
    forgotten = [sequence.compare(claim, courses, plan.seeds, claims) for claim in sequences if begun]
    after = _stronger(plan, done, asked[0])
    moved = {claim: _overlaps(done, claim) for claim in plan.grid.moved if plan.compares(claim)}
    held = [movement.decide(claim, overlaps, plan.seeds, claims) for claim, overlaps in moved.items() if begun]
    extra = [each.table for each in others if each.arms]
    extra += [retention.table(lines, kept)] if lines else []
    if after:
        extra.append(stronger.table(config.order, [_outcomes(done, asked[0], place) for place in (0, -1)], after))
    if held:
        extra.append(movement.table({claim.worse: overlaps for claim, overlaps in moved.items()}, held))
    folders = {arm.name: [unit.folder for unit in done if unit.arm == arm.name] for arm in plan.arms}
    texts = [each.write(plan.out) for each in (table, *extra)]
    skills = _skills(done, courses, folders)
    write_page(
        plan.out / PAGE,
        plan.grid,
        plan.help,
        plan.arms,
        main.base,
        main.arms,
        main.verdicts,
        folders,
        planned=len(every),
        failed=failed,
        overall=main.overall,
        kept=[*main.missing, *(said for each in others for said in each.said), *after, *kept, *forgotten, *held],
        found_tables=[table, *extra, *skills],
        lines=lines,
        matrices={arm: sequence.mean_skills(each) for arm, each in courses.items()},
        systems=config.sft.systems,
        claims=claims,
    )
    if main.arms:
        _written(plan.out / "plot.svg", XML + charts.accuracies(plan.grid, main.base, main.arms))
    if skills:
        texts.append(_written(plan.out / "systems.md", sequence.markdown(skills, forgotten)))
        _written(plan.out / "systems.csv", sequence.comma_separated(courses))
        _written(plan.out / "systems.tex", sequence.latex(skills))
    return "\n".join(texts)


def _compared(plan: Plan, units: Sequence[Unit], task: str, ends: Mapping[str, str], sweep: str) -> Compared:
    """The finished runs on the test rows (an empty `task`), or on a task of lm-eval.

    Args:
        ends: see `Plan.ends`.
        sweep: see `_sweep`.
    """
    found = _outcomes(units, task)
    starts = (read_outcome(unit.folder, unit.seed, "base", 0.0, task) for unit in units)
    start = next((Outcome(0, each.right, 0.0, None) for each in starts if each is not None), None)
    base = summarise("base", [start]) if start else None  # the same for all runs
    arms = {arm: summarise(arm, outcomes, ends.get(arm, "")) for arm, outcomes in found.items()}
    claims = plan.claims
    together = plan.comparisons
    decided = [
        decide(claim, found.get(claim.better, []), found.get(claim.worse, []), plan.seeds, ends, together)
        for claim in claims
        if units and plan.compares(claim)
    ]
    verdicts = [each for each in decided if isinstance(each, Verdict)]
    overall = sum_up(claims, verdicts, plan.compares)
    figures = figures_of(plan.grid, plan.source.config(), task)
    decisions: list[Said] = [*overall, *decided]
    table = tables.accuracy_table(plan.grid, base, arms, figures, decisions, task, sweep if arms else "")
    said = [Overall(each.found, f"On {task}: {each.sentence}") for each in decisions]
    missing = [each for each in decided if isinstance(each, Uncompared)]
    return Compared(base, arms, verdicts, overall, missing, said, table)


def _sweep(plan: Plan) -> str:
    """How the learning rates were found; empty without a sweep."""
    if not plan.swept:
        return ""
    counts = sorted(rows for unit in plan.sweeps if unit.finished and (rows := held_out_rows(unit)) is not None)
    held_out = " to ".join(map(str, dict.fromkeys(counts[:1] + counts[-1:])))
    tried = ", ".join(f"{rate:g}" for rate in sorted(plan.rates))
    return (
        f"Learning rates: for each arm that of the lowest loss on {held_out or 'the'} held-out rows with seed "
        f"{plan.seeds[0]}, of {tried} times the config's."
    )


def _stronger(plan: Plan, units: Sequence[Unit], task: str) -> list[Said]:
    """Verdicts on arms whose first stage is the stronger one, all together first."""
    if not units or not plan.grid.stronger:
        return []
    first, last = (_outcomes(units, task, place) for place in (0, -1))
    claims, together = plan.stronger, plan.comparisons
    found = [stronger.compare(claim, first, last, plan.seeds, together) for claim in claims if plan.compares(claim)]
    return [*sum_up(claims, [each for each in found if isinstance(each, Stronger)], plan.compares), *found]


def _outcomes(units: Sequence[Unit], task: str, place: int = -1) -> dict[str, list[Outcome]]:
    """Outcomes of the finished runs, by arm, after the stage at this place of their order."""
    found: dict[str, list[Outcome]] = {}
    for unit in units:
        outcome = read_outcome(unit.folder, unit.seed, unit.config.order[place], unit.config.sft.learning_rate, task)
        if outcome is not None:
            found.setdefault(unit.arm, []).append(outcome)
    return found


def _courses(plan: Plan, units: Sequence[Unit]) -> dict[str, list[Course]]:
    """Skills of a sequence grid's finished runs, by arm."""
    found: dict[str, list[Course]] = {}
    for unit in units if plan.grid.sequence else ():
        course = read_course(unit.folder, unit.config)
        if course is not None:
            found.setdefault(unit.arm, []).append(course)
    return found


def _skills(
    units: Sequence[Unit], courses: Mapping[str, Sequence[Course]], folders: Mapping[str, Sequence[Path]]
) -> list[tables.Table]:
    """The tables of Systems in sequence; none without a finished run.

    Args:
        folders: run directories by arm.
    """
    if not courses:
        return []
    untrained = next((skills for unit in units if (skills := sequence.read_answers(unit.folder, "base"))), None)
    return sequence.tables(courses, {arm: sequence.read_regions(folders[arm][0]) for arm in courses}, untrained)


def _lines(plan: Plan, units: Sequence[Unit]) -> dict[str, dict[str, list[Point]]]:
    """Points of a retention grid's finished runs, by line and arm."""
    found: dict[str, dict[str, list[Point]]] = {}
    for unit in units if plan.grid.lines else ():
        point = read_point(unit.folder, unit.config)
        if point is not None:
            found.setdefault(plan.grid.arm(unit.arm).line, {}).setdefault(unit.arm, []).append(point)
    return found


def _overlaps(units: Sequence[Unit], claim: Claim) -> list[Overlap]:
    """Unmasked finished runs against the mask of the finished run with the same seed."""
    masks = {unit.seed: unit.folder for unit in units if unit.arm == claim.better}
    runs = [unit for unit in units if unit.arm == claim.worse and unit.seed in masks]
    found = (movement.read_overlap(masks[unit.seed], unit.folder, unit.seed) for unit in runs)
    return [each for each in found if each is not None]


def chosen_rates(plan: Plan) -> dict[str, float]:
    """The learning rate with the lowest validation loss, by arm; arms with an unfinished sweep are left out."""
    if not plan.swept:
        return {}
    settings = plan.source.config().sft  # no arm sets what follows
    best = settings.validation > 0 and settings.keep == "best"
    losses: dict[str, dict[float, float]] = {}
    for unit in plan.sweeps:
        assert unit.rate is not None
        if unit.finished:
            losses.setdefault(unit.arm, {})[unit.rate] = validation_loss(unit.folder, best=best)
    complete = {arm: known for arm, known in losses.items() if len(known) == len(plan.rates)}
    return {arm: min(sorted(known), key=lambda rate: known[rate]) for arm, known in complete.items()}


def _written(file: Path, text: str) -> str:
    with atomic_path(file) as draft:
        draft.write_text(text, encoding="utf-8")
    return text
