"""Runs a grid: shared parts are computed once, a failed run does not stop others, and the table shows finished runs."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorapar_ray.ablations import sequence, tables
from lorapar_ray.ablations.at_once import AT_ONCE, alone_because, batches, groups_of, run_at_once
from lorapar_ray.ablations.grids import GRIDS, Arm, Grid
from lorapar_ray.ablations.results import Outcome, decide, read_outcome, summarise, validation_loss
from lorapar_ray.ablations.retention import Point, compare, joined, markdown, read_point
from lorapar_ray.ablations.sequence import Course, read_course, require_skills
from lorapar_ray.ablations.sharing import SHARED, borrow, borrow_sums
from lorapar_ray.ablations.units import Unit, counted, main_runs, sweep
from lorapar_ray.boundary import read_object
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path
from lorapar_ray.pipeline import PIPELINE, check, pending, run_stage
from lorapar_ray.progress import console
from lorapar_ray.redact import redact
from lorapar_ray.session import ray_session
from lorapar_ray.text import one_line

PAGE = "index.html"
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Plan:
    """A grid on one config."""

    grid: Grid
    arms: tuple[Arm, ...]
    file: Path
    overrides: tuple[str, ...]
    out: Path
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = RATES
    """Learning rates of a tuned grid's sweep, relative to the config's."""

    @cached_property
    def sweeps(self) -> list[Unit]:
        """The sweep's runs, from which each arm's learning rate is chosen."""
        if not self.grid.tuned or len(self.rates) < 2:
            return []
        return sweep(self.arms, self.file, self.overrides, self.out, self.seeds[0], self.rates)

    def units(self, rates: dict[str, float]) -> list[Unit]:
        """The runs that are compared."""
        return main_runs(
            self.arms,
            self.file,
            self.overrides,
            self.out,
            self.seeds,
            rates,
            bool(self.grid.lines or self.grid.sequence),
        )


def make_plan(
    grid: str,
    file: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    rates: Sequence[float] = RATES,
) -> Plan:
    """Check everything before anything starts.

    Raises:
        UserError: no such grid or arm, an arm that the config does not allow, or a skill that cannot be measured.
    """
    if grid not in GRIDS:
        raise UserError(f"ablate: unknown grid '{grid}'; known are {', '.join(GRIDS)}")
    chosen = GRIDS[grid]
    names = [arm.name for arm in chosen.arms]
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: no such arm of '{grid}'; known are {', '.join(names)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError("--seeds: give different whole numbers, such as 1,2,3")
    arms = tuple(arm for arm in chosen.arms if not only or arm.name in only)
    label = load_config(file, overrides).label
    if not label.voted:
        if without := [arm.name for arm in arms if arm.votes and arm.name in only]:
            raise UserError(f"--only {without[0]}: needs teachers that vote, and label.strategy is {label.strategy}")
        arms = tuple(arm for arm in arms if not arm.votes)
    for key in {each.partition("=")[0] for each in overrides} - set(chosen.free):
        if key == "seed" or any(change.startswith(f"{key}=") for arm in arms for change in arm.changes):
            raise UserError(f"--set {key}: the grid '{grid}' sets it itself; leave it out, or choose arms with --only")
    plan = Plan(chosen, arms, file, tuple(overrides), out, tuple(seeds), tuple(rates))
    units = plan.units({})
    if chosen.sequence:
        require_skills(units[0].config)
    for unit in [*plan.sweeps, *units]:
        try:
            check(unit.config, unit.stages)
        except UserError as error:
            raise UserError(f"arm {unit.arm}: {error}") from error
    return plan


def described(plan: Plan) -> Iterator[str]:
    """The plan of the grid, for `--dry-run`."""
    sweeps, units = plan.sweeps, plan.units({})
    yield f"{plan.grid.name}: {plan.grid.help}; {len(plan.arms)} arms × {len(plan.seeds)} seeds in '{plan.out}'"
    for arm in plan.arms:
        rank = [f"rank × {arm.rank_share:g}"] if arm.rank_share != 1 else []
        teachers = [f"{arm.teachers} teacher"] if arm.teachers is not None else []
        yield f"  {arm.name:<22} {' '.join([*arm.changes, *rank, *teachers]) or 'the config as it is'}"
    if sweeps:
        rates = ", ".join(f"{rate:g}" for rate in plan.rates)
        yield f"  first {len(sweeps)} short runs for each arm's learning rate (× {rates})"
    groups = [group for group in (*batches(sweeps), *batches(units)) if len(group) > 1]
    if groups:
        trained = sum(map(len, groups))
        most = max(map(len, groups))
        together = f"stage 1 of {trained} runs trains together, up to {most} adapters on one frozen base"
        yield f"  {together} (sft.arms_at_once)"
    at_once = max((len(group) for batch in batches(units) for group in groups_of(batch, "grpo")), default=0)
    if at_once > 1:
        yield f"  stage 2 trains up to {at_once} of these together, on one base and shared engines (grpo.arms_at_once)"
    for name, why in dict([*alone_because(sweeps), *alone_because(units)]).items():
        yield f"  {name} trains alone: {why}"
    seconds = _seconds(plan)
    known = 0.0
    for stage, wanted, computed in counted([*sweeps, *units]):
        took = seconds.get(stage)
        known += (took or 0.0) * computed
        each = f", about {took:.0f} s each, as measured on finished ones" if took else ""
        yield f"  {stage:<10} {computed} of {wanted} are computed, the others are copies{each}"
    if known:
        yield f"  about {known / 3600:.1f} hours in all, what is finished included"
    names = {arm.name for arm in plan.arms}
    for claim in (each for each in plan.grid.claims if {each.better, each.worse} <= names):
        yield f"  decides whether {claim.text} ({claim.better} against {claim.worse})"
    if plan.grid.sequence:
        systems = ", ".join(map(str, units[0].config.sft.systems))
        yield f"  each run trains System {systems} one after the other and answers the test rows after each"
    for claim in (each for each in plan.grid.sequence if {each.better, each.worse} <= names):
        yield f"  decides whether {claim.text} ({claim.better} against {claim.worse})"
    for claim in plan.grid.lines:
        yield f"  decides whether {claim.text}, at equal gain ({claim.better} against {claim.worse})"


def run_plan(plan: Plan, *, verbose: bool = False) -> list[str]:
    """Run unfinished units, and write the tables.

    Returns:
        a line for each run that failed.
    """
    failed: list[str] = []
    plan.out.mkdir(parents=True, exist_ok=True)
    sweeps = plan.sweeps
    for _ in _run_all(sweeps, plan.out, failed, verbose):
        pass
    rates = _chosen(sweeps)
    units = [unit for unit in plan.units(rates) if not sweeps or unit.arm in rates]
    for arm in plan.arms:
        if sweeps and arm.name not in rates:
            console.print(f"{arm.name}: its sweep is not finished, so its learning rate is unknown and it is skipped")
    for _ in _run_all(units, plan.out, failed, verbose):
        report(plan, failed)
    console.print(report(plan, failed))
    console.print(f"the page: {plan.out / PAGE}")
    return failed


def report(plan: Plan, failed: Sequence[str] = ()) -> str:
    """Write the tables and the page of finished runs; returns the table as Markdown."""
    from lorapar_ray.ablations.page import write_page

    units = plan.units(_chosen(plan.sweeps))
    found: dict[str, list[Outcome]] = {}
    base: list[Outcome] = []
    for unit in units:
        rate = unit.config.sft.learning_rate
        outcome = read_outcome(unit.folder, unit.seed, unit.config.order[-1], rate)
        if outcome is not None:
            found.setdefault(unit.arm, []).append(outcome)
        start = read_outcome(unit.folder, unit.seed, "base", 0.0)
        if start is not None and not base:  # the base is the same for all seeds
            base = [Outcome(0, start.right, 0.0, None)]
    verdicts = [decide(claim, found.get(claim.better, []), found.get(claim.worse, [])) for claim in plan.grid.claims]
    summaries = {arm: summarise(arm, outcomes) for arm, outcomes in found.items()}
    first = summarise("base", base) if base else None
    known = [each for each in verdicts if each is not None]
    lines, courses = _lines(plan, units), _courses(plan, units)
    kept = [each for claim in plan.grid.lines if (each := compare(claim, joined(lines))) is not None]
    forgotten = [lost for claim in plan.grid.sequence if (lost := sequence.compare(claim, courses)) is not None]
    folders = {arm.name: [unit.folder for unit in units if unit.arm == arm.name] for arm in plan.arms}
    write_page(
        plan.out / PAGE,
        plan.grid,
        plan.arms,
        first,
        summaries,
        known,
        folders,
        planned=len(units),
        failed=failed,
        kept=[*kept, *forgotten],
        lines=lines,
        matrices={arm: sequence.mean_skills(each) for arm, each in courses.items()},
        systems=units[0].config.sft.systems,
    )
    texts = [tables.write(plan.out, plan.grid, first, summaries, known)]
    if lines:
        texts.append(_written(plan.out / "retention.md", markdown(lines, kept)))
    if courses:
        untrained = next((skills for unit in units if (skills := sequence.read_skills(unit.folder, "base"))), None)
        regions = {arm: sequence.read_regions(folders[arm][0]) for arm in courses}
        texts.append(_written(plan.out / "systems.md", sequence.markdown(courses, regions, untrained, forgotten)))
        _written(plan.out / "systems.csv", sequence.comma_separated(courses))
    return "\n".join(texts)


def _written(file: Path, text: str) -> str:
    with atomic_path(file) as draft:
        draft.write_text(text)
    return text


def _courses(plan: Plan, units: Sequence[Unit]) -> dict[str, list[Course]]:
    """Skills of a sequence grid's finished runs, by arm."""
    found: dict[str, list[Course]] = {}
    for unit in units if plan.grid.sequence else ():
        course = read_course(unit.folder, unit.config)
        if course is not None:
            found.setdefault(unit.arm, []).append(course)
    return found


def _lines(plan: Plan, units: Sequence[Unit]) -> dict[str, dict[str, list[Point]]]:
    """Points of a retention grid's finished runs, by line and arm."""
    found: dict[str, dict[str, list[Point]]] = {}
    for unit in units if plan.grid.lines else ():
        point = read_point(unit.folder, unit.config)
        if point is not None:
            found.setdefault(plan.grid.arm(unit.arm).line, {}).setdefault(unit.arm, []).append(point)
    return found


def _chosen(sweeps: Sequence[Unit]) -> dict[str, float]:
    """The learning rate with the lowest validation loss, by arm; arms with an unfinished sweep are left out."""
    losses: dict[str, dict[float, float]] = {}
    complete: dict[str, bool] = {}
    for unit in sweeps:
        assert unit.rate is not None
        loss = validation_loss(unit.folder) if (unit.folder / "manifest.json").is_file() else None
        complete[unit.arm] = complete.get(unit.arm, True) and loss is not None
        if loss is not None:
            losses.setdefault(unit.arm, {})[unit.rate] = loss
    return {arm: min(known, key=lambda rate: known[rate]) for arm, known in losses.items() if complete[arm]}


def _run_all(units: Sequence[Unit], out: Path, failed: list[str], verbose: bool) -> Iterator[None]:
    """Run unfinished units; yields after each batch of runs."""
    due = [unit for unit in units if not _finished(unit)]
    with ray_session(verbose) if due else nullcontext():
        done = 0
        for group in batches(due):
            console.print(
                f"[{done + 1}–{done + len(group)}/{len(due)}]" if len(group) > 1 else f"[{done + 1}/{len(due)}]"
            )
            done += len(group)
            _run_batch(group, out, failed)
            yield


def _run_batch(units: Sequence[Unit], out: Path, failed: list[str]) -> None:
    """Run the units' stages, those of `AT_ONCE` together; later stages leave out a unit that failed."""
    parts = {unit.title: unit.parts(AT_ONCE if len(units) > 1 else ()) for unit in units}
    going = list(units)
    for number in range(max(map(len, parts.values()))):
        due = [unit for unit in going if number < len(parts[unit.title])]
        if number:
            firsts = {unit.title: parts[unit.title][number][0] for unit in due}
            for stage in dict.fromkeys(firsts.values()):
                run_at_once([unit for unit in due if firsts[unit.title] == stage], stage)
        lost = [unit for unit in due if not _run_part(unit, parts[unit.title][number], out, failed)]
        going = [unit for unit in going if unit not in lost]


def _run_part(unit: Unit, stages: Sequence[str], out: Path, failed: list[str]) -> bool:
    """Run some stages of a unit; returns whether they finished. An error is recorded, and other arms continue."""
    if not stages:
        return True
    console.print(unit.title)
    try:
        unit.run.open(unit.config)
        _run(unit, out, stages)
    except UserError as error:
        said = one_line(error, 300)
    except Exception as error:  # a bug of this project or of a library
        file = out / "failures" / f"{unit.folder.name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(redact(traceback.format_exc()))
        said = f"{type(error).__name__}: {one_line(error, 200)} (the full error is in '{file}')"
    else:
        return True
    failed.append(f"{unit.title}: {said}")
    console.print(f"  {failed[-1]}")
    return False


def _finished(unit: Unit) -> bool:
    return bool(unit.run.manifest()) and not pending(unit.config, unit.run, unit.stages)


def _run(unit: Unit, out: Path, stages: Sequence[str]) -> None:
    run = unit.run
    siblings = sorted(each.parent for each in out.glob("**/manifest.json"))
    for name in stages:
        if name in SHARED and borrow(unit.config, run, name, siblings):
            console.print(f"  {name} is a copy")
            continue
        if name == "score" and borrow_sums(unit.config, run, siblings):
            console.print("  score uses the sums of a run with another criterion")
        run_stage(unit.config, run, name)


def _seconds(plan: Plan) -> dict[str, float]:
    """Mean seconds of each finished stage."""
    spent: dict[str, list[float]] = {}
    for file in plan.out.glob("**/manifest.json"):
        for name, entry in read_object(file).get("stages", {}).items():
            if entry.get("status") == "done" and name in PIPELINE:
                spent.setdefault(name, []).append(float(entry.get("seconds", 0.0)))
    return {name: sum(each) / len(each) for name, each in spent.items()}
