"""The plan of `lorapar run --dry-run`: a line per stage, and under it the reason and what it would replace."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from lorapar_ray.config import Config
from lorapar_ray.pipeline import PIPELINE, dependents, stages_of, standings
from lorapar_ray.runs import RunDirectory

WORDS = {
    "done": "done",
    "new": "will run",
    "unfinished": "will go on",
    "changed": "needs --redo",
    "damaged": "needs --redo",
}


def plan(config: Config, run: RunDirectory, redo: Collection[str] = ()) -> Iterator[str]:
    """The lines of the plan.

    Args:
        redo: stages that may be replaced, as for `lorapar run --redo`.
    """
    found = standings(config, run)
    changing = [name for name, each in found.items() if each.state not in ("done",)]
    after = dependents(config, [*changing, *redo])
    allowed = {*redo, *dependents(config, redo)}
    for name in stages_of(config):
        stage, now = PIPELINE[name], found[name]
        anew = name in redo or (now.state in ("changed", "damaged") and (name in allowed or stage.is_view))
        word = "will be redone" if anew else WORDS[now.state]
        waits = not anew and now.state == "done" and name in after
        if waits:
            word = "will be redone" if stage.is_view else "done so far"
        yield f"{name:<10} {word:<15} {stage.resources(config) or 'this process only'}"
        yield from (f"  {reason}" for reason in now.why)
        if waits and not stage.is_view:
            yield "  depends on an unfinished stage above; if the results of that differ, this stage needs --redo too"
        owned = stage.owned(run, config.name)
        if (anew or now.state in ("changed", "damaged")) and owned:
            yield f"  replaces {', '.join(_described(path, run) for path in owned)}"


def _described(path: Path, run: RunDirectory) -> str:
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    size = sum(each.stat().st_size for each in files)
    count = f"{len(files)} files, " if path.is_dir() else ""
    return f"{path.relative_to(run.root)} ({count}{_bytes(size)})"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
