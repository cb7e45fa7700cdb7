"""The place of old results while a stage computes new ones: `trash/<time>-<stage>/`, with the stage's entry of the
manifest.

They are removed when the stage has finished. If it fails before it has written anything they are restored; otherwise
running the old settings again restores them.
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
from lorapar_ray.runs import RunDirectory, is_entry

ENTRY = "entry.json"


def set_aside(run: RunDirectory, stage: str, paths: Iterable[Path], entry: dict[str, Any]) -> Path:
    """Move a stage's files into the trash; returns the folder."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{stamp}{suffix}-{stage}" for suffix in ("", *(f".{number:03d}" for number in range(1, 1000))))
    folder = next(run.trash / name for name in names if not (run.trash / name).exists())
    write_json(folder / ENTRY, entry)
    for path in paths:
        target = folder / path.relative_to(run.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return folder


def put_back(run: RunDirectory, stage: str, folder: Path) -> None:
    """Undo `set_aside`; the target must not exist."""
    entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
    (folder / ENTRY).unlink()
    _move_back(folder, folder, run.root)
    shutil.rmtree(folder)
    _tidy(run)
    run.record(stage, **entry)


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
        target = root / path.relative_to(source)
        if path.is_dir() and not path.is_symlink() and target.is_dir():
            _move_back(path, source, root)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def _tidy(run: RunDirectory) -> None:
    if run.trash.is_dir() and not any(run.trash.iterdir()):
        run.trash.rmdir()
