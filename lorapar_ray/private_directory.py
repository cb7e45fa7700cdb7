"""Temporary directories of a process that may be killed: the next process that makes one removes those left behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorapar_ray.run_lock import ended, identity, parsed

PREFIX = "lorapar-ray-"
LOCK = "lock"
HOLDER = "holder.json"
"""Stands for the lock on a file system without locks (some mounts of NFS and Lustre): the process, which only its own
machine knows."""


@contextmanager
def private_directory(root: Path) -> Iterator[Path]:
    """A new directory, mode 0700, locked as long as this process lives and uses it."""
    remove_abandoned(root)
    folder, held = _locked_directory(root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)
            shutil.rmtree(folder, ignore_errors=True)  # NFS keeps the name of a file that is open


def _locked_directory(root: Path) -> tuple[Path, int | None]:
    """A new directory, and its locked lock file; None: its file system has no locks.

    Until the file is locked, another process may lock it first and remove the directory as abandoned. Its lock ends
    after that, so a file that is still there once it is locked here stays.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        held = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if not _locked(held):
                (folder / LOCK).unlink()  # another machine may have locks, and would find this one free
                (folder / HOLDER).write_text(json.dumps(identity()), encoding="utf-8")
                os.close(held)
                return folder, None
            if _is_file(held, folder / LOCK):
                return folder, held
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)
            raise
        os.close(held)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _is_file(opened: int, path: Path) -> bool:
    """Whether the open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(opened), path.lstat())
    except FileNotFoundError:
        return False


def remove_abandoned(root: Path) -> None:
    """Remove our directories whose lock no process holds.

    Unlike a process id, a lock also works for a process in another container that shares `root`. A directory without a
    lock may be new, and stays, unless its holder was a process of this machine that has ended.
    """
    for folder in root.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            if _holder_ended(folder):
                shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # a process holds it, or this file system has no locks
            pass
        finally:
            os.close(lock)


def _holder_ended(folder: Path) -> bool:
    try:
        if folder.stat().st_uid != os.getuid():  # another user's file may block who reads it
            return False
        return ended(parsed((folder / HOLDER).read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return False
