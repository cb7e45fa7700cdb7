"""A grid on one config: its arms, its seeds, and the runs that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from pathlib import Path

from lorapar_ray.ablations.grid import RATES, VALIDATION, Arm, Claim, Grid
from lorapar_ray.ablations.grids import GRIDS
from lorapar_ray.ablations.retention import require_tasks
from lorapar_ray.ablations.sequence import require_skills
from lorapar_ray.ablations.units import Source, Unit, main_runs, sweep, teachers_of
from lorapar_ray.config import LabelConfig
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import check

OWN_RATES = "each at its own learning rate"


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
    """Only for a tuned grid."""
    validation: float = VALIDATION

    @property
    def source(self) -> Source:
        """Where its runs come from."""
        return Source(self.file, self.overrides, self.out)

    @property
    def swept(self) -> bool:
        """Whether each arm's learning rate is found by a sweep."""
        return self.grid.tuned and len(self.rates) > 1

    @property
    def sweeps(self) -> list[Unit]:
        """The sweep's runs, from which each arm's learning rate is chosen."""
        if not self.swept:
            return []
        return sweep(self.arms, self.source, self.seeds[0], self.rates, self.validation)

    @property
    def help(self) -> str:
        """What the grid compares, and at which learning rates if it has a sweep."""
        if not self.grid.tuned:
            return self.grid.help
        return f"{self.grid.help}, {OWN_RATES if self.swept else 'all at one learning rate'}"

    def ends(self, rates: Mapping[str, float]) -> dict[str, str]:
        """The arms of `rates` whose learning rate is the lowest or the highest of the sweep, and which of the two.

        A better rate may be beyond it, so such an arm is not known to be compared at its best.
        """
        named = {min(self.rates): "lowest", max(self.rates): "highest"}
        return {arm: named[rate] for arm, rate in rates.items() if rate in named} if self.swept else {}

    @property
    def claims(self) -> list[Claim]:
        """The grid's claims about arms that the config allows; after a sweep they say so."""
        own = f", {OWN_RATES}" if self.swept else ""
        return [replace(claim, text=claim.text + own) for claim in self._allowed(self.grid.claims)]

    @property
    def stronger(self) -> list[Claim]:
        """Those of the grid's claims about a stronger first stage whose arms the config allows."""
        return self._allowed(self.grid.stronger)

    @property
    def asked(self) -> list[str]:
        """The sets of questions that each have a table and verdicts: the test rows (empty), and tasks of lm-eval."""
        config = self.source.config()
        return [""] * bool(config.data.test) + config.evaluate.tasks

    @cached_property
    def comparisons(self) -> int:
        """How many claims on two arms this run decides, whatever has finished."""
        once = [*self.stronger, *self.grid.moved, *self.grid.sequence]
        pairs = sum(map(self.compares, self.claims)) * len(self.asked) + sum(map(self.compares, once))
        return max(1, pairs + len(self.line_claims))

    def compares(self, claim: Claim) -> bool:
        """Whether both arms of a claim are in this run."""
        return {claim.better, claim.worse} <= {arm.name for arm in self.arms}

    @property
    def arms_of_lines(self) -> dict[str, list[str]]:
        """The names of each line's arms in this run."""
        found: dict[str, list[str]] = {}
        for arm in self.arms:
            found.setdefault(arm.line, []).append(arm.name)
        return found

    @property
    def line_claims(self) -> list[Claim]:
        """The claims about two lines of which both have an arm in this run."""
        lines = self.arms_of_lines
        return [claim for claim in self.grid.lines if {claim.better, claim.worse} <= lines.keys()]

    def _allowed(self, claims: Sequence[Claim]) -> list[Claim]:
        names = {arm.name for arm in _possible(self.grid.arms, self.source.config().label, ())}
        return [claim for claim in claims if {claim.better, claim.worse} <= names]

    def units(self, rates: dict[str, float]) -> list[Unit]:
        """The runs of all arms; an arm whose sweep has not finished is at the config's own rate."""
        return self._runs(self.arms, rates)

    def compared(self, rates: dict[str, float]) -> list[Unit]:
        """The runs that are compared: without the arms whose sweep has not finished, so one of the others evaluates the
        base."""
        return self._runs([arm for arm in self.arms if not self.swept or arm.name in rates], rates)

    def _runs(self, arms: Sequence[Arm], rates: dict[str, float]) -> list[Unit]:
        fixed = dict.fromkeys((arm.name for arm in arms), self.rates[0]) if len(self.rates) == 1 else {}
        return main_runs(arms, self.source, self.seeds, fixed or rates, self.grid.every_stage)


def make_plan(
    grid: str,
    file: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    rates: Sequence[float] = RATES,
    validation: float = VALIDATION,
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
    if len({f"{rate:g}" for rate in rates}) != len(rates) or not all(0 < rate < inf for rate in rates):
        raise UserError("--rates: give different numbers above 0, such as 0.5,1,2")
    if not chosen.tuned and tuple(rates) not in (RATES, (1.0,)):
        raise UserError(f"--rates: the grid '{grid}' has no sweep; set sft.learning_rate with --set")
    if not 0 < validation < 1:
        raise UserError(f"--validation {validation:g}: give a share of the training rows between 0 and 1, such as 0.1")
    arms = tuple(arm for arm in chosen.arms if not only or arm.name in only)
    arms = _possible(arms, load_config(file, overrides).label, only)
    for key in {each.partition("=")[0] for each in overrides} - set(chosen.free):
        if key == "seed" or any(change.startswith(f"{key}=") for arm in arms for change in arm.changes):
            raise UserError(f"--set {key}: the grid '{grid}' sets it itself; leave it out, or choose arms with --only")
    plan = Plan(chosen, arms, file, tuple(overrides), out, tuple(seeds), tuple(rates), validation)
    _require_cut(plan)
    units, sweeps = plan.units({}), plan.sweeps
    if missing := [
        each for each in (*sweeps, *units) if each.waits_for and each.waits_for not in (a.name for a in arms)
    ]:
        arm, other = missing[0].arm, missing[0].waits_for
        raise UserError(
            f"--only {arm}: has as many elements as {other} trains, and no {other} is cut; add --only {other}"
        )
    if chosen.sequence:
        require_skills(units[0].config)
    if chosen.lines:
        require_tasks(units[0].config)
    for unit in [*sweeps, *units]:
        try:
            check(unit.config, unit.stages)
        except UserError as error:
            raise UserError(f"arm {unit.arm}: {error}") from error
    return plan


def _require_cut(plan: Plan) -> None:
    """Check that arms whose mask others are compared with cut one.

    Raises:
        UserError: the config trains every element, or gives each System a region of its own.
    """
    cutting = [arm.as_large_as for arm in plan.arms if arm.as_large_as is not None]
    cutting += [plan.grid.arm(claim.better) for claim in plan.grid.moved if plan.compares(claim)]
    for arm in cutting:
        config = plan.source.config(arm.changes)
        if not config.partitioned or config.partition.regions != "stages":
            raise UserError(
                f"arm {arm.name}: other arms are compared with its mask, and this config cuts none for stage 1; set "
                "sft.masked: true and partition.regions: stages, or choose other arms (--only)"
            )


def _possible(arms: Sequence[Arm], label: LabelConfig, only: Sequence[str]) -> tuple[Arm, ...]:
    """The arms that the config's teachers allow.

    Raises:
        UserError: another one was asked for by name.
    """
    possible = []
    for arm in arms:
        why = ""
        if arm.votes and not label.voted:
            why = f"teachers that vote, and label.strategy is {label.strategy}"
        if len(label.teachers) < arm.needs or (arm.after and not teachers_of(arm, label.teachers)):
            why = f"{arm.needs} teachers with engines of their own, and label.teachers has {len(label.teachers)}"
        if why and arm.name in only:
            raise UserError(f"--only {arm.name}: needs {why}")
        if not why:
            possible.append(arm)
    return tuple(possible)
