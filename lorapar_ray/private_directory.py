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
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    held = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


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
