"""Votes for runs where SQLite does not work: in an object store, or on a network file system.

Every entry of the vote store is also appended, as a line of JSON, to the newest file of a folder, `000001.jsonl` and so
on. Nothing is locked, renamed or changed in place, so the folder can be on any file system and be copied anywhere. Each
process rebuilds the store from it on its machine's own disk, and adds to files of its own: several may share a folder,
and each sees the others' entries when it starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

SEGMENT_BYTES = 4 * 2**20
"""Size from which a new file begins; a later copy of the folder sends only the newest file again."""
NETWORKED = ("nfs", "lustre", "cifs", "smb", "gpfs", "beegfs", "ceph", "fuse", "9p", "afs", "glusterfs", "orangefs")
"""Prefixes of file system types whose locks work only on one machine, or not at all."""
MOUNTS = Path("/proc/self/mountinfo")

Rows = list[list[Any]]


class Journal:
    """Rows of answers and of failures, in the order in which they were added."""

    def __init__(self, folder: Path) -> None:
        """`folder` may not exist yet. Each process begins a new file, since an older one may end within a line, or be
        another process's."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = folder
        self._size = SEGMENT_BYTES

    def rows(self) -> Iterator[tuple[Rows, Rows]]:
        """All entries so far, without a line that a kill cut off.

        Raises:
            ValueError: a whole line is damaged.
        """
        for file in segments(self._folder):
            for line in file.read_bytes().split(b"\n")[:-1]:
                found = json.loads(line)
                yield found["answers"], found["failures"]

    def add(self, answers: Rows, failures: Rows) -> None:
        """Add some rows."""
        if self._size >= SEGMENT_BYTES:
            self._file, self._size = self._begun(), 0
        line = json.dumps({"answers": answers, "failures": failures}).encode() + b"\n"
        with self._file.open("ab") as file:
            file.write(line)
        self._size += len(line)

    def _begun(self) -> Path:
        """A new file, which no other process begins too."""
        while True:
            number = max((int(file.stem) for file in segments(self._folder)), default=0) + 1
            file = self._folder / f"{number:06d}.jsonl"
            with suppress(FileExistsError):
                file.touch(exist_ok=False)
                return file


def segments(folder: Path) -> list[Path]:
    """The files of a journal, in order; none if there is no journal."""
    return sorted((file for file in folder.glob("*.jsonl") if file.stem.isdecimal()), key=lambda file: int(file.stem))


def is_networked(path: Path, mounts: str | None = None) -> bool:
    """Whether a path, which may not exist or lead through links, is on a file system that other machines share.

    Args:
        mounts: the text of `/proc/self/mountinfo`; None: this machine's. See proc(5).
    """
    if mounts is None:
        try:
            mounts = MOUNTS.read_text(encoding="utf-8")
        except OSError:
            return False
    found, path = "", path.resolve()
    longest = -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = Path(fields[4].encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= longest:  # a later mount hides an earlier one
            longest, found = len(point.parts), after.split()[0]
    return found.startswith(NETWORKED)
