"""The plan of `lorapar run --dry-run`: a line per stage, and under it the reason and what it would replace."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from lorapar_ray import trash
from lorapar_ray.config import Config
from lorapar_ray.files import finished_files
from lorapar_ray.pending_redo import redo_of
from lorapar_ray.pipeline import PIPELINE, dependents, stages_of, standings
from lorapar_ray.running import restorable
from lorapar_ray.runs import RunDirectory
from lorapar_ray.standing import Standing

WORDS = {
    "done": "done",
    "new": "will run",
    "unfinished": "will go on",
    "changed": "needs --redo",
    "damaged": "needs --redo",
}


RESTORED = {"done": "will be restored from trash/", "started": "will be restored from trash/ and go on"}
"""By the status of what is in the trash."""


def plan(config: Config, run: RunDirectory, redo: Collection[str] = ()) -> Iterator[str]:
    """The lines of the plan.

    Args:
        redo: stages that may be replaced, as for `lorapar run --redo`.

    Raises:
        UserError: the run directory belongs to another config.
    """
    run.require_own(config)
    found = standings(config, run)
    under = redo_of(config, run, stages_of(config), redo)
    again, allowed = under.again(run), under.allowed
    limits = {name: under.id if name in again else None for name in found}
    restored = {name: status for name in found if (status := _in_trash(config, run, name, found, limits[name]))}
    again = [name for name in again if name not in restored]
    moving = {name for name, each in found.items() if each.state != "done" and restored.get(name) != "done"} | {*again}
    moving |= {*dependents(config, moving)}
    for name in stages_of(config):
        stage, now = PIPELINE[name], found[name]
        begun_again = now.state == "unfinished" and bool(trash.in_trash(run, name))
        stale = now.state in ("changed", "damaged") and name not in restored
        anew = (name in again and not begun_again) or (stale and (name in allowed or stage.is_view))
        word = "will be redone" if anew else RESTORED[restored[name]] if name in restored else WORDS[now.state]
        waits = not anew and not stale and now.state != "new" and any(need in moving for need in stage.needs(config))
        if waits and now.state == "done":
            word = "will be redone" if stage.is_view else "done so far"
        yield f"{name:<10} {word:<15} {stage.resources(config) or 'this process only'}"
        yield from (f"  {reason}" for reason in now.why)
        if waits and not stage.is_view:
            then = "is redone" if name in allowed else "needs --redo too"
            yield f"  depends on a stage above; if the results of that change, this stage {then}"
        owned = stage.owned(run, config.name)
        if (anew or stale or (waits and name in allowed)) and owned:
            yield f"  replaces {', '.join(_described(path, run) for path in owned)}"


def _in_trash(config: Config, run: RunDirectory, name: str, found: Mapping[str, Standing], redo_id: str | None) -> str:
    """The status of the results that the run would restore; empty if there are none."""
    folder = restorable(PIPELINE[name], config, run, found[name].state, redo_id)
    return "" if folder is None else str(trash.in_trash(run, name)[folder]["status"])


def _described(path: Path, run: RunDirectory) -> str:
    files = finished_files(path) if path.is_dir() else [path]
    size = sum(each.stat().st_size for each in files if each.exists())
    count = f"{len(files)} files, " if path.is_dir() else ""
    return f"{path.relative_to(run.root)} ({count}{_bytes(size)})"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
