"""The units of a grid: one run for each arm and seed, and the stages that units share."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from lorapar_ray.ablations.grid import Arm
from lorapar_ray.ablations.sizes import USUAL_SHARE, rank_of_size, trained_share
from lorapar_ray.config import Config, TeacherConfig
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.files import digest, finished_files
from lorapar_ray.partition.regions import STAGE_1, STAGE_2
from lorapar_ray.pipeline import PIPELINE, pending, stages_of
from lorapar_ray.runs import RunDirectory
from lorapar_ray.standing import recorded_inputs

CRITERION = "score.criterion"
"""The setting of `score` that does not change the sums of gradients from which scores are computed."""


class OwnCut(NamedTuple):
    """What a training stage reads of the cut."""

    bit: int
    """The bit of the regions that says what the stage may change; it reads no other."""
    others_share: str
    """The setting of the cut that changes only what the other training stage trains."""


OWN_CUT = {"sft": OwnCut(STAGE_1, "partition.beta"), "grpo": OwnCut(STAGE_2, "partition.alpha")}


@dataclass(frozen=True)
class Unit:
    """One run of a grid."""

    arm: str
    seed: int
    config: Config
    folder: Path
    rate: float | None = None
    """A sweep's learning rate, relative to the config's; None: no sweep."""
    waits_for: str = ""
    """The arm whose mask decides this run's rank, while that is not cut yet: the config is then a guess."""

    @property
    def run(self) -> RunDirectory:
        """Its run directory."""
        return RunDirectory(self.folder)

    @property
    def finished(self) -> bool:
        """Whether the run has finished all its stages with these settings: its results may be of an earlier plan's."""
        try:
            return not self.waits_for and bool(self.run.manifest()) and not pending(self.config, self.run, self.stages)
        except UserError:  # it is damaged, and says so when it runs
            return False

    @property
    def title(self) -> str:
        """Its name in the log."""
        return f"{self.arm}, seed {self.seed}" + ("" if self.rate is None else f", rate × {self.rate:g}")

    @property
    def stages(self) -> list[str]:
        """The stages to run; a sweep ends with stage 1, since it needs only its validation loss."""
        names = [name for name in stages_of(self.config) if name != "report"]
        return names if self.rate is None else names[: names.index("sft") + 1]

    def parts(self, firsts: Sequence[str]) -> list[list[str]]:
        """The stages to run in parts: each stage of `firsts` begins a new part."""
        found: list[list[str]] = [[]]
        for name in self.stages:
            if name in firsts:
                found.append([])
            found[-1].append(name)
        return found


def merged(*groups: Sequence[str]) -> list[str]:
    """All overrides; a later group's replace an earlier group's."""
    found: dict[str, str] = {}
    for change in (each for group in groups for each in group):
        found[change.partition("=")[0].strip()] = change
    return list(found.values())


def teachers_of(arm: Arm, teachers: Sequence[TeacherConfig]) -> list[TeacherConfig]:
    """The config's teachers that an arm asks."""
    before = {each.name for each in teachers[: arm.after]}
    return [each for each in teachers[arm.after :] if each.engine_of not in before][: arm.teachers]


@dataclass(frozen=True)
class Source:
    """Where a grid's runs come from."""

    file: Path
    overrides: Sequence[str]
    out: Path

    def config(self, *changes: Sequence[str]) -> Config:
        """The config with the overrides and further changes.

        Raises:
            UserError: it does not allow them.
        """
        return load_config(self.file, merged(self.overrides, *changes))

    def changes_of(self, arm: Arm, rate: float, own: Sequence[str]) -> tuple[list[str], str]:
        """An arm's changes of the config, and the arm that it waits for (see `Unit.waits_for`).

        Args:
            rate: factor on the learning rate of stage 1.
            own: the run's further changes, such as its seed.

        Raises:
            UserError: the config does not allow them.
        """
        teachers: list[str] = []
        if arm.teachers is not None:
            kept = teachers_of(arm, self.config().label.teachers)
            teachers = [f"label.teachers={json.dumps([each.model_dump(mode='json') for each in kept])}"]
        changes = merged(arm.changes, teachers, own)
        config, waits_for = self.config(changes), ""
        if arm.as_large_as is not None:
            rank, waits_for = self._rank(arm.name, arm.as_large_as, config)
            alpha = config.adapter.alpha * rank / config.adapter.rank
            changes = merged(changes, [f"adapter.rank={rank}", f"adapter.alpha={alpha:g}"])
        if arm.second_rate != 1:
            last = config.order[-1]
            changes.append(f"{last}.learning_rate={getattr(config, last).learning_rate * arm.second_rate:.6g}")
        if rate != 1:
            changes = merged(changes, [f"sft.learning_rate={config.sft.learning_rate * rate:.6g}"])
        return changes, waits_for

    def _rank(self, name: str, other: Arm, config: Config) -> tuple[int, str]:
        """The rank of an arm that is as large as `other`, and whether it waits for that."""
        if config.adapter.rank == 1:
            raise UserError(
                f"arm {name}: no LoRA has a lower rank than adapter.rank 1; raise it, or choose other arms (--only)"
            )
        share = trained_share(self.out, other.name, self.config(other.changes, [f"seed={config.seed}"]))
        rank = rank_of_size(config.adapter.rank, USUAL_SHARE if share is None else share)
        return rank, other.name if share is None else ""

    def unit(
        self, arm: Arm, folder: Path, own: Sequence[str], *, factor: float = 1.0, rate: float | None = None
    ) -> Unit:
        """One run of an arm."""
        changes, waits_for = self.changes_of(arm, factor, own)
        config = _sharing_votes(self.config(changes), self.out)
        return Unit(arm.name, config.seed, config, own_folder(folder, config), rate, waits_for)


NAMES = {"adapter.rank": "rank", "sft.learning_rate": "rate", "sft.validation": "validation"}
"""Settings that may differ between two plans of one grid (by the sweep, its options, or another arm's mask), and their
names in the name of a run directory."""


def own_folder(folder: Path, config: Config) -> Path:
    """`folder`; or, if it has results of other `NAMES`, one beside it with what differs in its name."""
    recorded: dict[str, Any] = {}
    for entry in entries_in(folder).values():
        recorded |= recorded_inputs(entry).get("settings", {})
    present = {path: attrgetter(path)(config) for path in NAMES}
    other = [path for path, value in present.items() if recorded.get(path, value) != value]
    return folder.with_name("-".join([folder.name, *(f"{NAMES[path]}-{present[path]:g}" for path in other)]))


def sweep(arms: Iterable[Arm], source: Source, seed: int, rates: Sequence[float], validation: float) -> list[Unit]:
    """Every arm with every learning rate and one seed; `validation`, a share of the training rows, is held out."""
    own = [f"seed={seed}", f"sft.validation={validation:g}", "order=[sft]", "evaluate.models=[sft]"]
    folder = source.out / f"sweep-{seed}"
    return [
        source.unit(arm, folder / f"{arm.name}-{rate:g}", own, factor=rate, rate=rate) for arm in arms for rate in rates
    ]


def main_runs(
    arms: Sequence[Arm], source: Source, seeds: Sequence[int], rates: dict[str, float], every_stage: bool = False
) -> list[Unit]:
    """Every arm with every seed; only one run evaluates the base, which is the same in all.

    Args:
        rates: the learning rate that each arm's sweep chose, relative to the config's.
        every_stage: evaluate every adapter that training leaves, not only the last.
    """
    units = [
        source.unit(
            arm,
            source.out / f"{arm.name}-{seed}",
            [f"seed={seed}", "evaluate.models=null"],
            factor=rates.get(arm.name, 1.0),
        )
        for arm in arms
        for seed in seeds
    ]
    with_base = [unit for unit in units if _has_base(unit.folder)] or units[:1]
    return [evaluating(unit, every_stage, base=unit in with_base) for unit in units]


def evaluating(unit: Unit, every_stage: bool, *, base: bool) -> Unit:
    """The run with the models that it evaluates.

    Args:
        every_stage: see `main_runs`.
    """
    trained = unit.config.trained if every_stage else [unit.config.order[-1]]
    evaluate = unit.config.evaluate.model_copy(update={"models": ["base", *trained] if base else trained})
    return replace(unit, config=unit.config.model_copy(update={"evaluate": evaluate}))


def run_folders(out: Path) -> list[Path]:
    """The folders of a grid's runs that have begun, sorted: those that are compared, and the sweeps'."""
    return [file.parent for file in finished_files(out) if file.name == "manifest.json"]


def entries_in(folder: Path) -> dict[str, Any]:
    """The stages in a run's manifest; none if it is damaged, which the run itself reports: the other runs go on."""
    try:
        found: dict[str, Any] = RunDirectory(folder).manifest().get("stages", {})
    except UserError:
        return {}
    return found


def _has_base(folder: Path) -> bool:
    """Whether a run has evaluated the base, with this choice of arms and seeds or an earlier one."""
    entry = entries_in(folder).get("evaluate", {})
    return "base" in (recorded_inputs(entry).get("settings", {}).get("evaluate.models") or ())


def _sharing_votes(config: Config, out: Path) -> Config:
    """The config with one file of votes for the whole grid, so that no teacher answers a question twice."""
    if not config.label.voted or config.label.cache is not None:
        return config
    cache = str((out / "votes.sqlite").absolute())
    return config.model_copy(update={"label": config.label.model_copy(update={"cache": cache})})


def shared_keys(unit: Unit, without: Collection[str] = ()) -> dict[str, str]:
    """For each stage a key of all that decides its result: runs with equal keys share the stage.

    Args:
        without: settings to leave out.
    """
    keys: dict[str, str] = {}

    def key(name: str, needs: dict[str, str], *left_out: str) -> str:
        settings = PIPELINE[name].settings(unit.config).items()
        kept = {path: each.value for path, each in settings if path not in (*without, *left_out)}
        return digest(json.loads(json.dumps([name, kept, needs], default=str)))

    for name in unit.stages:
        needs = {need: keys[need] for need in PIPELINE[name].needs(unit.config) if need in keys}
        if name in OWN_CUT and "partition" in needs:  # it reads its own mask only
            needs["partition"] = key("partition", {"score": keys["score"]}, OWN_CUT[name].others_share)
        keys[name] = key(name, needs)
    return keys


def counted(units: Sequence[Unit]) -> Iterator[tuple[str, int, list[Unit]]]:
    """(stage, number of units that need it, those that compute it) over all units.

    Scores by another criterion count as copies: they come from the same sums.
    """
    keys, sums = [shared_keys(unit) for unit in units], [shared_keys(unit, {CRITERION}) for unit in units]
    for name in PIPELINE:
        found = [
            (each[name], unit)
            for each, unit in zip(sums if name == "score" else keys, units, strict=True)
            if name in each
        ]
        if found:
            yield name, len(found), list(dict(reversed(found)).values())[::-1]
