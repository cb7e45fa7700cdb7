"""The place of old results while a stage computes new ones: `trash/<time>-<stage>/`, with the stage's entry of the
manifest.

They are removed when the stage has finished. If it fails before it has written anything they are restored; otherwise
running the old settings again restores them.

While files are moved, in either direction, the stage's entry in the manifest names the folder (`MOVING`). So if the
process is killed meanwhile, the next command puts back what is left in the folder (`settle`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorapar_ray.files import write_json
from lorapar_ray.manifest import is_entry
from lorapar_ray.runs import RunDirectory

ENTRY = "entry.json"
MOVING = "moving"
"""In an entry of the manifest: the folder of the trash from or to which its files are on their way."""


def set_aside(run: RunDirectory, stage: str, paths: Iterable[Path], entry: dict[str, Any]) -> Path:
    """Move a stage's files into the trash; returns the folder.

    Until the stage is recorded again, `settle` undoes this.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{stamp}{suffix}-{stage}" for suffix in ("", *(f".{number:03d}" for number in range(1, 1000))))
    folder = next(run.trash / name for name in names if not (run.trash / name).exists())
    write_json(folder / ENTRY, entry)
    run.record(stage, **{**entry, MOVING: folder.name})
    for path in paths:
        target = folder / path.relative_to(run.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return folder


def put_back(run: RunDirectory, stage: str, folder: Path) -> None:
    """Undo `set_aside`; the target must not exist."""
    entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
    run.record(stage, **{**entry, MOVING: folder.name})
    _move_back(folder, folder, run.root)
    shutil.rmtree(folder)
    _tidy(run)
    run.record(stage, **entry)


def settle(run: RunDirectory) -> list[str]:
    """Put back what a killed process has left between the trash and its place; returns the stages."""
    found = {name: each[MOVING] for name, each in run.manifest().get("stages", {}).items() if MOVING in each}
    for stage, name in found.items():
        folder = run.trash / Path(str(name)).name
        if folder in in_trash(run, stage):
            put_back(run, stage, folder)
        else:  # all files were in place already
            run.record(stage, **{key: value for key, value in run.entry(stage).items() if key != MOVING})
    return list(found)


def in_trash(run: RunDirectory, stage: str) -> dict[Path, dict[str, Any]]:
    """Folders of a stage with the entries they came with, the newest first."""
    found = {}
    for folder in sorted(run.trash.glob(f"*-{stage}"), reverse=True):
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
            if is_entry(entry):
                found[folder] = entry
    return found


def empty(run: RunDirectory, stage: str) -> None:
    """Remove a stage's replaced results."""
    for folder in in_trash(run, stage):
        shutil.rmtree(folder, ignore_errors=True)
    _tidy(run)


def _move_back(folder: Path, source: Path, root: Path) -> None:
    """Folders that exist on both sides are merged, such as `work/`."""
    for path in sorted(folder.iterdir()):
        if path == source / ENTRY:
            continue
        target = root / path.relative_to(source)
        if path.is_dir() and not path.is_symlink() and target.is_dir():
            _move_back(path, source, root)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def _tidy(run: RunDirectory) -> None:
    if run.trash.is_dir() and not any(run.trash.iterdir()):
        run.trash.rmdir()
