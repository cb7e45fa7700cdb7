"""Runs stages that are not done, one of a run or the same one of several runs, and replaces no result without leave.

An interrupted stage continues from its partial results. A stage with results of other inputs does not overwrite them:
it reports what has changed and needs `redo`. What is replaced waits in the trash until the new results are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorapar_ray import legacy, trash
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.manifest import REDO
from lorapar_ray.perform import perform, performing, placed
from lorapar_ray.pipeline import PIPELINE, dependents, entries_of, require_stages, standings
from lorapar_ray.progress import console
from lorapar_ray.result_stages import shortened
from lorapar_ray.run_lock import run_lock
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Stage
from lorapar_ray.standing import Standing, differences, inputs_of

Redo = Literal["no", "if_changed", "yes"]
"""Whether a stage's results may be replaced; `if_changed`: only those of other inputs, or damaged ones."""


def require_leave(config: Config, run: RunDirectory, stages: Sequence[str], allowed: Collection[str]) -> None:
    """Check before anything starts that no finished result or checkpoint would be replaced that may not be.

    Args:
        stages: what is to run.
        allowed: the stages that may be replaced.

    Raises:
        UserError: names what has changed or is damaged, what that would replace, and how to allow it; or the stage that
            must run before.
    """
    found = standings(config, run)
    for name in stages:
        stage = PIPELINE[name]
        _require_needs(stage, config, run, {**found, **dict.fromkeys(stages, Standing("done"))})
        now = found[name].state
        if name in allowed or stage.is_view or now not in ("changed", "damaged"):
            continue
        if restorable(stage, config, run, now) is None:
            raise _refusal(config, run, name, found)


class NeedsRedo(UserError):
    """A stage has results of other inputs, or damaged ones; `found` says which, without the command line's fix."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found + fix)
        self.found = found


def _refusal(config: Config, run: RunDirectory, name: str, found: dict[str, Standing], before: str = "") -> NeedsRedo:
    some = shortened(found[name].why)
    after = [each for each in dependents(config, [name]) if found[each].state != "new" and not PIPELINE[each].is_view]
    following = f" (and, if its new results differ, those of {' and '.join(after)})" if after else ""
    if found[name].state == "damaged":
        damage = f"{before}{name}: its results in '{run.place}' are damaged ({some})"
        return NeedsRedo(damage, f"; --redo {name} replaces them{following}")
    return NeedsRedo(
        f"{before}{name}: has results of other inputs ({some})",
        f". --redo {name} replaces them{following}, and the old ones stay "
        "in trash/ until the new are finished; else restore the setting or choose another --run-dir",
    )


def run_stage(config: Config, run: RunDirectory, name: str, redo: Redo = "no", redo_id: str = "") -> None:
    """Run one stage, unless it is done, and record it.

    Args:
        redo: `yes` replaces its results; `if_changed` only if they are of other inputs, or damaged.
        redo_id: of the redo under which it is computed anew (see `pending_redo`), to be recorded with it.

    Raises:
        UserError: it is not in the run, a stage it needs has not finished, its results would be replaced without
            `redo`, the run directory is in use, or as the stage itself raises.
    """
    stage = PIPELINE[name]
    require_stages(config, [name], ())
    with run_lock(run.root):
        legacy.adopt(config, run, PIPELINE)
        settle(run)
        try:
            due = _due(stage, config, run, redo, redo_id)
            if due is None:
                console.print(f"[green]✓[/] {name}: done", markup=True)
            else:
                perform(stage, config, run, due.inputs, spent=due.spent, aside=due.aside, redo=redo_id)
        finally:
            run.fingerprints.save()


Member = tuple[Config, RunDirectory]
"""A run and its config."""


def run_together(
    name: str,
    members: Sequence[Member],
    work: Callable[[list[Member]], list[dict[str, Any]]],
    redo: Redo = "no",
) -> None:
    """Run one stage of several runs at once, and record it in each; runs in which it is done are left out.

    Args:
        work: does the work of all, from the partial results of each; returns notes for each one's manifest.
        redo: as for `run_stage`.

    Raises:
        UserError: as `run_stage`, for any of them, before anything starts; or as `work` raises.
    """
    stage = PIPELINE[name]
    with ExitStack() as held:
        due: list[tuple[Member, _Due]] = []
        for config, run in members:
            require_stages(config, [name], ())
            held.enter_context(run_lock(run.root))
            held.callback(run.fingerprints.save)
            legacy.adopt(config, run, PIPELINE)
            settle(run)
            found = _due(stage, config, run, redo)
            if found is not None:
                due.append(((config, run), found))
        if not due:
            return
        notes = [
            held.enter_context(
                performing(stage, config, run, each.inputs, spent=each.spent, aside=each.aside, sharing=len(due))
            )
            for (config, run), each in due
        ]
        for note, found_note in zip(
            notes, work([(placed(config, name), run) for (config, run), _ in due]), strict=True
        ):
            note |= found_note


@dataclass(frozen=True)
class _Due:
    """A stage that is to run; see `perform.performing`."""

    inputs: dict[str, Any]
    spent: float
    aside: Path | None


def _due(stage: Stage, config: Config, run: RunDirectory, redo: Redo, redo_id: str = "") -> _Due | None:
    """The remaining work of a stage, with replaced results set aside; None: it is done."""
    name = stage.name
    found = standings(config, run)
    _require_needs(stage, config, run, found)
    if _take_back(stage, config, run, found[name].state, redo_id if redo == "yes" else None):
        found = standings(config, run)
        redo = "if_changed" if redo == "yes" else redo
    now = found[name].state
    if now == "done" and redo != "yes":
        return None
    replaces = now in ("changed", "damaged")
    if replaces and redo == "no" and not stage.is_view:
        raise _refusal(config, run, name, found)
    begun_again = now == "unfinished" and bool(trash.in_trash(run, name))
    anew = replaces or (redo == "yes" and not begun_again)
    entry = run.entry(name)
    inputs = inputs_of(stage, config, entries_of(config, run), run.fingerprints)
    aside = None
    if not entry:
        _require_nothing_unknown(stage, run)
    elif anew and (owned := stage.owned(run, config.name)):
        aside = trash.set_aside(run, name, owned, entry)
    spent = entry.get("seconds", 0.0) if now == "unfinished" and aside is None else 0.0
    return _Due(inputs, spent, aside)


def _require_needs(stage: Stage, config: Config, run: RunDirectory, found: dict[str, Standing]) -> None:
    for need in stage.needs(config) if not stage.is_view else ():
        if found[need].state in ("changed", "damaged"):
            raise _refusal(config, run, need, found, f"{stage.name} needs '{need}'. ")
        if found[need].state != "done":
            raise UserError(
                f"{stage.name}: stage '{need}' has not finished in '{run.place}'; run `lorapar {need}` first"
            )


def restorable(stage: Stage, config: Config, run: RunDirectory, now: str, redo_id: str | None = None) -> Path | None:
    """Results of the present inputs in the trash, if those in place are of other inputs or incomplete.

    A process that is killed while it moves results leaves them incomplete.

    Args:
        now: the stage's state.
        redo_id: only results that were begun under this redo; None: any.
    """
    if now not in ("changed", "damaged"):
        return None
    entries, prints = entries_of(config, run), run.fingerprints
    found = trash.in_trash(run, stage.name).items()
    fits = (
        folder
        for folder, each in found
        if redo_id in (None, each.get(REDO)) and not differences(stage, config, each, entries, prints)
    )
    return next(fits, None)


def _take_back(stage: Stage, config: Config, run: RunDirectory, now: str, redo_id: str | None) -> bool:
    """Whether results of the present inputs were in the trash (see `restorable`) and have been restored."""
    folder = restorable(stage, config, run, now, redo_id)
    if folder is None:
        return False
    if now == "changed" and (owned := stage.owned(run, config.name)):
        trash.set_aside(run, stage.name, owned, run.entry(stage.name))
    trash.put_back(run, stage.name, folder)
    console.print(f"  {stage.name}: its results for these settings are restored from trash/")
    return True


def settle(run: RunDirectory) -> None:
    """Complete what a process was killed at while it moved results to the trash or back: they are restored."""
    for name in trash.settle(run):
        console.print(
            f"  {name}: its earlier results are restored from trash/; a command was killed while it moved them"
        )


def _require_nothing_unknown(stage: Stage, run: RunDirectory) -> None:
    for place_ in stage.outputs:
        path = run.root / place_
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise UserError(f"{stage.name}: '{path}' holds files that this run has not written; move them away")
