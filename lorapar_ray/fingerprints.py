"""Digests of file contents; a file is read again only after it has changed.

`Fingerprints` remembers a file's sha256 with its size and times in one JSON file, so that the next request needs only a
`stat`. It uses the time of the last change too: unlike the time of the last write, no copy or archive sets it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorapar_ray.files import digest, write_json
from lorapar_ray.user_modules import MODULE, module_file

SETTLED_S = 2.0
"""A file that changed less than this ago may change again within one tick of the clock: it is not remembered yet."""
STAMPS = 3
OF_A_FOLDER = (
    ".json",
    ".safetensors",
    ".model",
    ".txt",
    ".jinja",
    ".py",
    ".jsonl",
    ".parquet",
    ".csv",
    ".yaml",
    ".arrow",
    ".gz",
    ".tiktoken",
)
"""Files of a model, an adapter or a data set that change its results."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")
"""Weights that a teacher's engine computes with only if the folder has no safetensors. Beside those they do not count:
they are a second copy, or an optimizer's state."""
COUNTED_LATER = (".tiktoken", *OTHER_WEIGHTS)
"""Those that earlier versions did not count."""
TIMES = ("seconds", "latency", "per_second")
"""A JSON key with one of these words describes speed, not the result."""
ABOUT_VOTING = ("votes",)
"""Columns of labels that no later stage reads; they hold how fast each teacher answered."""


class Fingerprints:
    """sha256 of files, remembered by size and times."""

    def __init__(self, memory: Path) -> None:
        """`memory` is the file that keeps them; it may be missing, damaged or deleted at any time."""
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        try:
            loaded = json.loads(memory.read_text(encoding="utf-8"))
            self._known = {path: entry for path, entry in loaded.items() if len(entry) == STAMPS + 1}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            self._known = {}

    def of_file(self, path: Path) -> str:
        """The sha256 of a file, in hex."""
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        known = self._known.get(str(path))
        if known is not None and known[:STAMPS] == stamp:
            return str(known[STAMPS])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if min(abs(time.time() - each) for each in (status.st_mtime, status.st_ctime)) > SETTLED_S:
            self._known[str(path)] = [*stamp, found]
            self._changed = True
        return found

    def of_input(self, name: str, *, earlier: bool = False) -> str | None:
        """What a user's path holds: a file, or the folder of a model, adapter or data set; None if there is neither.
        `module NAME`: the file of a Python module (see `user_modules`).

        Args:
            earlier: as versions recorded it that did not count `COUNTED_LATER`.
        """
        try:
            if name.startswith(MODULE):
                found_file = module_file(name.removeprefix(MODULE))
                return None if found_file is None else self.of_file(found_file)
            path = Path(name).expanduser()
            if path.is_file():
                return self.of_file(path.resolve())
            if not path.is_dir():
                return None
            root = path.resolve()
            found = [
                each for each in root.rglob("*") if each.suffix in (*OF_A_FOLDER, *OTHER_WEIGHTS) and each.is_file()
            ]
            safe = {each.parent for each in found if each.suffix == ".safetensors"}
            of_it = [each for each in found if each.suffix in OF_A_FOLDER or not safe & {root, each.parent}]
            of_it = [each for each in of_it if not earlier or each.suffix not in COUNTED_LATER]
            return digest([[str(each.relative_to(root)), self.of_file(each)] for each in sorted(of_it)])
        except (OSError, RuntimeError):  # unreadable, or of an unknown user: the stage that needs it reports the error
            return None

    def save(self) -> None:
        """Save the digests."""
        if self._changed and self._memory.parent.parent.is_dir():
            write_json(self._memory, self._known)
            self._changed = False


def meaning(files: Iterable[Path], root: Path, prints: Fingerprints) -> str:
    """Digest of the parts of finished files that later stages use; timings do not count."""
    return digest([[str(path.relative_to(root)), _meaning_of(path, prints)] for path in sorted(files)])


def _meaning_of(path: Path, prints: Fingerprints) -> str:
    if path.suffix == ".json":
        return digest(_without_times(json.loads(path.read_text(encoding="utf-8"))))
    return _table(path) if path.suffix == ".parquet" else prints.of_file(path)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if not any(word in key for word in TIMES)}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


def _table(path: Path) -> str:
    import pyarrow.parquet as pq

    total = hashlib.sha256()
    file = pq.ParquetFile(path)
    columns = [name for name in file.schema_arrow.names if name not in ABOUT_VOTING]
    total.update(repr(columns).encode())
    for batch in file.iter_batches(columns=columns):
        total.update(batch.serialize())
    return total.hexdigest()
