"""The units of a grid: one run for each arm and seed, and the stages that units share."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorapar_ray.ablations.grids import Arm
from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.files import digest
from lorapar_ray.pipeline import PIPELINE, pending, stages_of
from lorapar_ray.runs import RunDirectory

CRITERION = "score.criterion"
"""The setting of `score` that does not change the sums of gradients from which scores are computed."""


@dataclass(frozen=True)
class Unit:
    """One run of a grid."""

    arm: str
    seed: int
    config: Config
    folder: Path
    rate: float | None = None
    """A sweep's learning rate, relative to the config's; None: no sweep."""

    @property
    def run(self) -> RunDirectory:
        """Its run directory."""
        return RunDirectory(self.folder)

    @property
    def finished(self) -> bool:
        """Whether the run has finished all its stages with these settings: its results may be of an earlier plan's."""
        return bool(self.run.manifest()) and not pending(self.config, self.run, self.stages)

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


def changes_of(arm: Arm, file: Path, overrides: Sequence[str], rate: float = 1.0) -> list[str]:
    """The arm's overrides of a config, with its learning rate multiplied by `rate`.

    Raises:
        UserError: the config does not allow them.
    """
    teachers: list[str] = []
    if arm.teachers is not None:
        kept = load_config(file, overrides).label.teachers[: arm.teachers]
        teachers = [f"label.teachers={json.dumps([each.model_dump(mode='json') for each in kept])}"]
    changes = merged(overrides, arm.changes, teachers)
    config = load_config(file, changes)
    if arm.rank_share != 1:
        rank = max(1, round(arm.rank_share * config.adapter.rank))
        alpha = config.adapter.alpha * rank / config.adapter.rank
        changes = merged(changes, [f"adapter.rank={rank}", f"adapter.alpha={alpha:g}"])
    if arm.second_rate != 1:
        last = config.order[-1]
        own = getattr(config, last).learning_rate * arm.second_rate
        changes = merged(changes, [f"{last}.learning_rate={own:.6g}"])
    return changes if rate == 1 else merged(changes, [f"sft.learning_rate={config.sft.learning_rate * rate:.6g}"])


def sweep(
    arms: Iterable[Arm],
    file: Path,
    overrides: Sequence[str],
    out: Path,
    seed: int,
    rates: Sequence[float],
    validation: float,
) -> list[Unit]:
    """Every arm with every learning rate and one seed; `validation`, a share of the training rows, is held out."""
    units: list[Unit] = []
    own = [f"seed={seed}", f"sft.validation={validation:g}", "order=[sft]", "evaluate.models=[sft]"]
    for arm in arms:
        for rate in rates:
            config = _sharing_votes(load_config(file, merged(changes_of(arm, file, overrides, rate), own)), out)
            units.append(Unit(arm.name, seed, config, out / f"sweep-{seed}" / f"{arm.name}-{rate:g}", rate))
    return units


def main_runs(
    arms: Sequence[Arm],
    file: Path,
    overrides: Sequence[str],
    out: Path,
    seeds: Sequence[int],
    rates: dict[str, float],
    every_stage: bool = False,
) -> list[Unit]:
    """Every arm with every seed; only one run evaluates the base, which is the same in all.

    Args:
        rates: the learning rate that each arm's sweep chose, relative to the config's.
        every_stage: evaluate every adapter that training leaves, not only the last.
    """
    units: list[Unit] = []
    folders = {(arm.name, seed): out / f"{arm.name}-{seed}" for arm in arms for seed in seeds}
    with_base = [each for each, folder in folders.items() if _has_base(folder)] or list(folders)[:1]
    for arm in arms:
        changes = changes_of(arm, file, overrides, rates.get(arm.name, 1.0))
        for seed in seeds:
            plain = _sharing_votes(load_config(file, merged(changes, [f"seed={seed}", "evaluate.models=null"])), out)
            trained = plain.trained if every_stage else [plain.order[-1]]
            asked = ["base", *trained] if (arm.name, seed) in with_base else trained
            config = plain.model_copy(update={"evaluate": plain.evaluate.model_copy(update={"models": asked})})
            units.append(Unit(arm.name, seed, config, folders[arm.name, seed]))
    return units


def _has_base(folder: Path) -> bool:
    """Whether a run has evaluated the base, with this choice of arms and seeds or an earlier one."""
    entry = RunDirectory(folder).entry("evaluate") if (folder / "manifest.json").is_file() else {}
    return "base" in (entry.get("inputs", {}).get("settings", {}).get("evaluate.models") or ())


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
    for name in unit.stages:
        stage = PIPELINE[name]
        settings = {path: each.value for path, each in stage.settings(unit.config).items() if path not in without}
        needs = {need: keys[need] for need in stage.needs(unit.config) if need in keys}
        keys[name] = digest(json.loads(json.dumps([name, settings, needs], default=str)))
    return keys


def counted(units: Sequence[Unit]) -> Iterator[tuple[str, int, int]]:
    """(stage, number of units that need it, number that compute it) over all units.

    Scores by another criterion count as copies: they come from the same sums.
    """
    keys, sums = [shared_keys(unit) for unit in units], [shared_keys(unit, {CRITERION}) for unit in units]
    for name in PIPELINE:
        wanted = [each[name] for each in (sums if name == "score" else keys) if name in each]
        if wanted:
            yield name, len(wanted), len(set(wanted))
