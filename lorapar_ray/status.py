"""A run's progress, read from its directory alone: from any machine that can read it, during a stage or after it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from lorapar_ray.boundary import read_object
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.manifest import FORMAT
from lorapar_ray.pipeline import STAGES
from lorapar_ray.progress import console, minutes
from lorapar_ray.result_stages import RESULTS, outdated_results, results_of, shortened
from lorapar_ray.runs import PROGRESS, RunDirectory
from lorapar_ray.standing import recorded_standing
from lorapar_ray.text import one_line

REFRESH_S, REFRESH_REMOTE_S = 1.0, 5.0
READ = ("manifest.json", "config.yaml", "work/progress.json")
"""The files of a run that are read."""
SILENT_S = 30.0
"""Without a sign of progress, its age is shown."""


def lines(run: RunDirectory) -> Iterator[str]:
    """The run, and a line for each stage that it has begun or that comes next.

    Raises:
        UserError: there is no run, or its manifest is damaged.
    """
    manifest = run.manifest()
    if not manifest:
        raise UserError(f"run directory '{run.place}' holds no run (no manifest.json)")
    holder = run.holder()
    name = one_line(manifest["identity"].get("name", "?"))
    yield f"{name} · {run.place} · {_at_work(holder)}"
    entries, note = manifest["stages"], _note(run)
    noted = note.get("stage")  # another stage that has begun was interrupted
    outdated = _outdated(run, manifest)
    for stage in STAGES:
        entry = entries.get(stage, {})
        if entry.get("status") == "done":
            old = f" · out of date ({one_line(shortened(outdated[stage], 2))})" if stage in outdated else ""
            yield f"✓ {stage:<10} {minutes(entry.get('seconds', 0))}{old}"
        elif entry:
            works = holder is not None and noted in (stage, None)
            yield f"{'▶' if works else '✗'} {stage:<10} {_far(note) if works else _interrupted(entry)}"
        else:
            yield f"· {stage:<10}"


def _outdated(run: RunDirectory, manifest: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Stages whose results are out of date, as far as the manifest and the settings last used tell it, and why."""
    if manifest.get("format") != FORMAT:
        return {}
    try:
        config = load_config(run.root / "config.yaml")
    except UserError:  # gone, or of another version
        return {}
    entries = manifest["stages"]
    found = {name: recorded_standing(RESULTS[name], config, entries) for name in results_of(config)}
    return outdated_results(config, entries, found)


def _at_work(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "no command is running"
    return one_line(
        f"{holder.get('command', '?')} is running: process {holder.get('pid', '?')} on {holder.get('host', '?')} since "
        f"{holder.get('since', '?')}"
    )


def _interrupted(entry: dict[str, Any]) -> str:
    return f"interrupted after {minutes(entry.get('seconds', 0))}; the same command resumes"


def _note(run: RunDirectory) -> dict[str, Any]:
    """The running stage's last note; empty if there is none yet."""
    try:
        return read_object(run.work / PROGRESS, "delete it")
    except UserError:
        return {}


def _far(note: dict[str, Any]) -> str:
    try:
        done, total, now = int(note["done"]), int(note["total"]), float(note["now"])
        what, left, remark = one_line(note["what"]), one_line(note["left"]), one_line(note["remark"], 80)
    except (KeyError, TypeError, ValueError):
        return "starting"
    silence = time.time() - now
    age = f" · last seen {minutes(silence)} ago" if silence > SILENT_S else ""
    return " ".join(each for each in (what, f"{done}/{total}", left, remark) if each) + age


def follow(run: RunDirectory) -> None:
    """Show `lines` on the terminal repeatedly, until no command is running or Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    with Live(Text("\n".join(lines(run))), console=console, auto_refresh=False) as live:
        try:
            at_work = run.holder() is not None
            while at_work:
                time.sleep(REFRESH_S if run.remote is None else REFRESH_REMOTE_S)
                if run.remote is not None:
                    run.remote.look()
                at_work = run.holder() is not None  # before the lines are read: the last ones show the end
                live.update(Text("\n".join(lines(run))), refresh=True)
        except KeyboardInterrupt:
            pass
