"""The stages in order, and which of them are done.

A stage is done if it has finished on its present inputs: the settings that change its result, the contents of the
user's files and the results of earlier stages. All three are recorded with it. `lorapar_ray.running` runs the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lorapar_ray import legacy
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.reporting.stage import STAGE as REPORT
from lorapar_ray.result_stages import RESULTS, outdated_results, results_of
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Stage
from lorapar_ray.standing import Standing, standing_of

ORDER: tuple[Stage, ...] = (*RESULTS.values(), REPORT)
PIPELINE: dict[str, Stage] = {stage.name: stage for stage in ORDER}
STAGES: tuple[str, ...] = tuple(PIPELINE)


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages of a run in order: STAGES, with the training stages as `order` has them."""
    return (*results_of(config), REPORT.name)


def check(config: Config, stages: Sequence[str], redo: Collection[str] = ()) -> None:
    """Find errors that would otherwise stop one of `stages` hours after the start.

    Raises:
        UserError: `redo` names another stage, there is nothing to evaluate on, or a reward or a tracker is missing.
    """
    require_stages(config, stages, redo)
    for name in stages:
        PIPELINE[name].check(config)


def check_there(config: Config, stages: Sequence[str]) -> None:
    """The checks that need the student or the nodes' environment; Ray runs.

    Raises:
        UserError: one of `stages` cannot work with this student, or lacks a tracker's key.
    """
    for name in stages:
        PIPELINE[name].check_there(config)


def require_stages(config: Config, stages: Sequence[str], redo: Collection[str]) -> None:
    """Check that every stage of `redo` is among `stages`, those that a command runs, and these among the run's.

    Raises:
        UserError: one is not.
    """
    for name in stages:
        if name not in stages_of(config):
            raise UserError(
                f"{name}: not in this run's order [{', '.join(config.order)}]; add it to order in the config"
            )
    unknown = [name for name in redo if name not in stages_of(config)]
    if unknown:
        raise UserError(f"--redo {unknown[0]}: not among this run's stages ({', '.join(stages_of(config))})")
    elsewhere = [name for name in redo if name not in stages]
    if elsewhere:
        raise UserError(f"--redo {elsewhere[0]}: this command runs {', '.join(stages)}")


def standings(config: Config, run: RunDirectory) -> dict[str, Standing]:
    """The state of every stage of the run; a view has changed too if other results are out of date than it says."""
    entries, prints = legacy.entries(config, run, PIPELINE), run.fingerprints
    found = {name: standing_of(PIPELINE[name], config, run, entries, prints) for name in stages_of(config)}
    outdated = {name: list(why) for name, why in outdated_results(config, entries, found).items()}
    for name, own in found.items():
        if PIPELINE[name].is_view and own.state == "done" and entries[name].get("outdated", {}) != outdated:
            found[name] = Standing("changed", ("other results are out of date than it says",))
    return found


def pending(config: Config, run: RunDirectory, stages: Sequence[str] | None = None) -> list[str]:
    """The stages (None: all of the run's) that are not done, and those that need one of them."""
    found = standings(config, run)
    due: list[str] = []
    for name in stages_of(config):
        if found[name].state != "done" or any(need in due for need in PIPELINE[name].needs(config)):
            due.append(name)
    return [name for name in due if stages is None or name in stages]


def is_done(config: Config, run: RunDirectory, name: str) -> bool:
    """Whether `name` has finished on its present inputs, and its results are unchanged."""
    return standings(config, run)[name].state == "done"


def dependents(config: Config, names: Collection[str]) -> list[str]:
    """The stages after `names` that use their results, directly or not."""
    found: list[str] = []
    for name in stages_of(config):
        if name not in names and any(need in names or need in found for need in PIPELINE[name].needs(config)):
            found.append(name)
    return found


def entries_of(config: Config, run: RunDirectory) -> dict[str, Any]:
    """The manifest's entries by stage, converted from earlier versions if necessary."""
    return legacy.entries(config, run, PIPELINE)
