"""The plan of a grid in words, for `--dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorapar_ray.ablations.at_once import alone_because, batches, groups_of, stage1_key
from lorapar_ray.ablations.plan import Plan
from lorapar_ray.ablations.units import Unit, counted, entries_in, run_folders, teachers_of
from lorapar_ray.ablations.verdicts import FEWEST_SEEDS, level_shown
from lorapar_ray.ablations.work import TRAINED, devices_of, held_out_rows, of_rows, steps_of_all
from lorapar_ray.pipeline import PIPELINE


def described(plan: Plan) -> Iterator[str]:
    """The lines of the plan: arms, runs that train together, work and time, and the claims that it decides."""
    sweeps, units = plan.sweeps, plan.units({})
    yield f"{plan.grid.name}: {plan.help}; {len(plan.arms)} arms × {len(plan.seeds)} seeds in '{plan.out}'"
    yield from _arms(plan)
    if sweeps:
        rates = ", ".join(f"{rate:g}" for rate in plan.rates)
        held_out = f"the lowest loss on {plan.validation:.0%} of the training rows{_held_out(sweeps)}"
        yield f"  first {len(sweeps)} runs of stage 1 for each arm's learning rate (× {rates}): {held_out}"
    yield from _together(sweeps, units)
    yield from _work(plan, [*sweeps, *units])
    yield from _claims(plan, units[0])


def _held_out(sweeps: Sequence[Unit]) -> str:
    """How many rows decide each arm's learning rate, where it is known."""
    counts = {held_out_rows(unit) for unit in sweeps}
    known = sorted(each for each in counts if each is not None)
    if len(known) < len(counts):
        return ""
    labelled = all(any(unit.run.labels.glob("*.parquet")) for unit in sweeps)
    return f" ({'' if labelled else 'at most '}{' to '.join(map(str, dict.fromkeys((known[0], known[-1]))))} rows)"


def _arms(plan: Plan) -> Iterator[str]:
    known = plan.source.config().label.teachers
    for arm in plan.arms:
        rank = [f"a rank with as many elements as {arm.as_large_as.name} trains"] if arm.as_large_as else []
        asked = [each.name for each in teachers_of(arm, known)] if arm.teachers is not None else []
        teachers = [f"teachers {', '.join(asked)}"] if asked else []
        yield f"  {arm.name:<22} {' '.join([*arm.changes, *rank, *teachers]) or 'the config as it is'}"


def _together(sweeps: Sequence[Unit], units: Sequence[Unit]) -> Iterator[str]:
    """Which runs train on one base, and why others do not."""
    trains = ({stage1_key(unit) for unit in group} for group in (*batches(sweeps), *batches(units)))
    groups = [group for group in trains if len(group) > 1]
    if groups:
        trained, most = sum(map(len, groups)), max(map(len, groups))
        together = f"stage 1 of {trained} runs trains together, up to {most} adapters on one frozen base"
        yield f"  {together} (sft.arms_at_once)"
    at_once = max((len(group) for batch in batches(units) for group in groups_of(batch, "grpo")), default=0)
    if at_once > 1:
        yield f"  stage 2 trains up to {at_once} of these together, on one base and shared engines (grpo.arms_at_once)"
    for name, why in dict([*alone_because(sweeps), *alone_because(units)]).items():
        yield f"  {name} trains alone: {why}"


def _work(plan: Plan, units: Sequence[Unit]) -> Iterator[str]:
    """How often each stage is computed, its steps, and the time, where it is known."""
    seconds = _seconds(plan)
    hours, held, unknown = 0.0, dict[str, float](), []
    for stage, wanted, computing in counted(units):
        line = f"  {stage:<10} {len(computing)} of {wanted} are computed, the others are copies"
        kind, devices = devices_of(computing[0].config, stage)
        if stage in TRAINED:
            steps = steps_of_all(computing, stage)
            line += f"; {of_rows(computing, stage) if steps is None else f'at most {steps:,} optimiser steps in all'}"
        line += f"; on {devices:g} {kind}{'s' if devices != 1 else ''}"
        if took := seconds.get(stage):
            line += f", about {took:.0f} s each, as measured on finished ones"
            spent = took * len(computing) / 3600
            hours, held[kind] = hours + spent, held.get(kind, 0.0) + spent * devices
        else:
            unknown.append(stage)
        yield line
    if hours:
        each = " and ".join(f"{amount:.1f} {kind}-hours" for kind, amount in held.items())
        without = f"; without {', '.join(unknown)}, of which none is finished" if unknown else ""
        yield f"  about {hours:.1f} hours in all, {each}, what is finished included{without}"
    else:
        first = next(arm.name for arm in plan.arms if arm.as_large_as is None or len(plan.arms) == 1)
        one = f"--only {first} --seeds {plan.seeds[0]}{' --rates 1' if plan.swept else ''}"
        yield f"  its hours are not known before a first run has finished in this directory; one gives them: {one}"


def _claims(plan: Plan, unit: Unit) -> Iterator[str]:
    if plan.grid.sequence:
        systems = ", ".join(map(str, unit.config.sft.systems))
        yield f"  each run trains System {systems} one after the other and answers the test rows after each"
    if len(plan.seeds) < FEWEST_SEEDS:
        yield f"  decides no claim: that needs {FEWEST_SEEDS} seeds, and --seeds gives {len(plan.seeds)}"
        return
    claims = [*plan.claims, *plan.stronger, *plan.grid.moved, *plan.grid.sequence]
    for claim in filter(plan.compares, claims):
        yield f"  decides whether {claim.text} ({claim.better} against {claim.worse})"
    if (n := plan.comparisons) > 1:
        yield f"  decides each of {n} claims by its {level_shown(n)} interval: together they hold at 95 % (Bonferroni)"
    for claim in plan.line_claims:
        yield f"  decides whether {claim.text}, at equal gain ({claim.better} against {claim.worse})"


def _seconds(plan: Plan) -> dict[str, float]:
    """Mean seconds of each finished stage."""
    spent: dict[str, list[float]] = {}
    for folder in run_folders(plan.out):
        for name, entry in entries_in(folder).items():
            if entry.get("status") == "done" and name in PIPELINE:
                spent.setdefault(name, []).append(float(entry.get("seconds", 0.0)))
    return {name: sum(each) / len(each) for name, each in spent.items()}
