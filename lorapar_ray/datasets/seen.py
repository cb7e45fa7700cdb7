"""A set of texts on disk, to find duplicates among millions of questions without using much memory."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorapar_ray.files import no_space


class SeenTexts:
    """Digests of texts, white space aside."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        # it is deleted with the process, so it need not survive a crash
        self._database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
        self._database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, text: str) -> bool:
        """Add a text; False if it was already in the set."""
        key = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
        try:
            return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            raise no_space(tempfile.gettempdir(), "free some, or set TMPDIR to a folder on another disk") from error

    def close(self) -> None:
        self._database.close()


@contextmanager
def seen_texts(count: int) -> Iterator[list[SeenTexts]]:
    """Some empty sets, removed afterwards.

    Raises:
        UserError: (from `add`) the disk of the temporary folder is full.
    """
    with tempfile.TemporaryDirectory(prefix="lorapar-seen-") as folder:
        sets = [SeenTexts(Path(folder) / str(index)) for index in range(count)]
        try:
            yield sets
        finally:
            for each in sets:
                each.close()
