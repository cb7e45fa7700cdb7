"""Files that appear whole or not at all, and digests of values. Imports nothing of this project but its error."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorapar_ray.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


def expanded(path: str | Path, field: str = "path") -> Path:
    """A path with `~` expanded.

    Args:
        field: names it in messages.

    Raises:
        UserError: it begins with `~name` of no user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{field} '{path}': there is no such user's home directory") from error


def cache_root() -> Path:
    """This machine's own directory (models, copies of objects): `$LORAPAR_CACHE`, else `~/.cache/lorapar_ray`."""
    return expanded(os.environ.get("LORAPAR_CACHE", "~/.cache/lorapar_ray"), "LORAPAR_CACHE")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a sibling path to write a file or directory to; on a clean exit it replaces `target`.

    Raises:
        UserError: the disk is full; nothing that was there before is lost.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        draft = scratch / target.name
        yield draft
        if draft.is_dir() and target.is_dir():
            _swap(draft, target, scratch / "replaced")
        else:
            draft.replace(target)
    except Exception as error:
        if is_of_a_full_disk(error):
            raise no_space(target) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def no_space(place: object, fix: str = "free some and run the same command again") -> UserError:
    """The error of a full disk, or of a full quota on it."""
    return UserError(f"no space left on the disk of '{place}'; {fix}")


def is_of_a_full_disk(error: BaseException) -> bool:
    """Whether an error means that a disk or a quota is full; safetensors reports this only in its text."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    said = str(error)
    return any(f"(os error {number})" in said or f"[Errno {number}]" in said for number in FULL)


def _swap(draft: Path, target: Path, aside: Path) -> None:
    """Put a directory in another's place; if that fails, the other stays."""
    target.rename(aside)
    try:
        draft.rename(target)
    except BaseException:
        aside.rename(target)
        raise


def finished_files(root: Path) -> list[Path]:
    """All files of a directory and of those in it, sorted, also while a process writes there.

    `Path.glob` raises an error when a directory, as `atomic_path` makes them, is removed while it looks.
    """
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def write_json(target: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    with atomic_path(target) as draft:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")  # a lone surrogate as its JSON escape


def digest(value: Any) -> str:
    """Hex digest of a JSON-ready value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
