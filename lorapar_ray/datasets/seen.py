"""A set of texts on disk, to find duplicates among millions of questions without using much memory."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from lorapar_ray.files import is_of_a_full_disk, no_space


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
        with _temporary_space():
            return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1

    def close(self) -> None:
        self._database.close()


@contextmanager
def seen_texts(count: int) -> Iterator[list[SeenTexts]]:
    """Some empty sets, removed afterwards.

    Raises:
        UserError: (also from `add`) the disk of the temporary folder is full.
    """
    with ExitStack() as stack:
        with _temporary_space():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorapar-seen-")))
            sets = [stack.enter_context(closing(SeenTexts(folder / str(index)))) for index in range(count)]
        yield sets


@contextmanager
def _temporary_space() -> Iterator[None]:
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        if is_of_a_full_disk(error) or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise no_space(tempfile.gettempdir(), "free some, or set TMPDIR to a folder on another disk") from error
        raise
