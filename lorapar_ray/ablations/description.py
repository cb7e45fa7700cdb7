"""The plan of a grid in words, for `--dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorapar_ray.ablations.at_once import alone_because, batches, groups_of
from lorapar_ray.ablations.plan import Plan
from lorapar_ray.ablations.units import Unit, counted
from lorapar_ray.boundary import read_object
from lorapar_ray.pipeline import PIPELINE


def described(plan: Plan) -> Iterator[str]:
    """The lines of the plan: arms, runs that train together, work and time, and the claims that it decides."""
    sweeps, units = plan.sweeps, plan.units({})
    yield f"{plan.grid.name}: {plan.help}; {len(plan.arms)} arms × {len(plan.seeds)} seeds in '{plan.out}'"
    yield from _arms(plan)
    if sweeps:
        rates = ", ".join(f"{rate:g}" for rate in plan.rates)
        held_out = f"the lowest loss on {plan.validation:.0%} of the training rows"
        yield f"  first {len(sweeps)} runs of stage 1 for each arm's learning rate (× {rates}): {held_out}"
    yield from _together(sweeps, units)
    yield from _work(plan, [*sweeps, *units])
    yield from _claims(plan, units[0])


def _arms(plan: Plan) -> Iterator[str]:
    for arm in plan.arms:
        rank = [f"a rank with as many elements as {arm.as_large_as.name} trains"] if arm.as_large_as else []
        teachers = [f"{arm.teachers} teacher"] if arm.teachers is not None else []
        yield f"  {arm.name:<22} {' '.join([*arm.changes, *rank, *teachers]) or 'the config as it is'}"


def _together(sweeps: Sequence[Unit], units: Sequence[Unit]) -> Iterator[str]:
    """Which runs train on one base, and why others do not."""
    groups = [group for group in (*batches(sweeps), *batches(units)) if len(group) > 1]
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
    """How often each stage is computed, and the time, where it is known."""
    seconds = _seconds(plan)
    known = 0.0
    for stage, wanted, computed in counted(units):
        took = seconds.get(stage)
        known += (took or 0.0) * computed
        each = f", about {took:.0f} s each, as measured on finished ones" if took else ""
        yield f"  {stage:<10} {computed} of {wanted} are computed, the others are copies{each}"
    if known:
        yield f"  about {known / 3600:.1f} hours in all, what is finished included"


def _claims(plan: Plan, unit: Unit) -> Iterator[str]:
    names = {arm.name for arm in plan.arms}
    for claim in (each for each in plan.claims if {each.better, each.worse} <= names):
        yield f"  decides whether {claim.text} ({claim.better} against {claim.worse})"
    if plan.grid.sequence:
        systems = ", ".join(map(str, unit.config.sft.systems))
        yield f"  each run trains System {systems} one after the other and answers the test rows after each"
    for claim in (each for each in plan.grid.sequence if {each.better, each.worse} <= names):
        yield f"  decides whether {claim.text} ({claim.better} against {claim.worse})"
    for claim in plan.grid.lines:
        yield f"  decides whether {claim.text}, at equal gain ({claim.better} against {claim.worse})"


def _seconds(plan: Plan) -> dict[str, float]:
    """Mean seconds of each finished stage."""
    spent: dict[str, list[float]] = {}
    for file in plan.out.glob("**/manifest.json"):
        for name, entry in read_object(file).get("stages", {}).items():
            if entry.get("status") == "done" and name in PIPELINE:
                spent.setdefault(name, []).append(float(entry.get("seconds", 0.0)))
    return {name: sum(each) / len(each) for name, each in spent.items()}
