"""Temporary directories of a process that may be killed: the next process that makes one removes those left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "lorapar-ray-"
LOCK = "lock"


@contextmanager
def private_directory(root: Path) -> Iterator[Path]:
    """A new directory, mode 0700, locked as long as this process lives and uses it."""
    remove_abandoned(root)
    folder, held = _locked_directory(root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _locked_directory(root: Path) -> tuple[Path, int]:
    """A new directory, and its locked lock file.

    Until the file is locked, another process may lock it first and remove the directory as abandoned. Its lock ends
    after that, so a file that is still there once it is locked here stays.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        held = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            if _is_file(held, folder / LOCK):
                return folder, held
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)
            raise
        os.close(held)


def _is_file(opened: int, path: Path) -> bool:
    """Whether the open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(opened), path.lstat())
    except FileNotFoundError:
        return False


def remove_abandoned(root: Path) -> None:
    """Remove our directories whose lock no process holds.

    Unlike a process id, a lock also works for a process in another container that shares `root`. A directory without a
    lock may be new, and stays.
    """
    for folder in root.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # a process holds it, or this file system has no locks
            pass
        finally:
            os.close(lock)
