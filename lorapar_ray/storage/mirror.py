"""Keeps a folder on this machine's disk equal to the objects under a URI, in either direction.

`.mirror.json` in the folder holds the stamp under which each file was copied, so only changed files are copied.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from lorapar_ray.files import finished_files, write_json
from lorapar_ray.storage import INDEX
from lorapar_ray.storage.cache import Cache
from lorapar_ray.storage.claims import FOLDER
from lorapar_ray.storage.objects import Objects, Stamp, may_be_a_file, side_by_side

MANIFEST = "manifest.json"
"""Records which stages have finished, so it is copied after everything else."""
OWN = (FOLDER, "lock.json", "work/ray", "work/digests.json", "work/votes.sqlite")
"""Files of one machine, or of the store itself; never copied."""

Wanted = Callable[[str], bool]


@dataclass(frozen=True)
class _Copy:
    """The state of a file and its object when they were equal."""

    local: tuple[int, int]
    """Size and mtime in nanoseconds."""
    remote: Stamp
    tag: str
    """Empty if it was not requested."""


class Mirror:
    """A mirror of `objects` in `root`, which may not exist yet. Its methods may be called from any thread."""

    def __init__(self, root: Path, objects: Objects, cache: Cache | None = None) -> None:
        """`cache`: shared with other processes of this machine."""
        self.root, self.objects = root, objects
        self._cache = cache
        self._copies = self._read_index()
        self._turn = threading.RLock()

    def pull(self, wanted: Wanted, *, look_closely: bool = False, restore: bool = False) -> None:
        """Fetch every wanted object that has changed, and remove files whose objects no longer exist.

        Files that were never copied stay. Files that were removed here are not fetched again.

        Args:
            restore: fetch files that were removed here, too.
            look_closely: also compare tags: two writes within a second may have the same stamp.

        Raises:
            UserError: the store cannot be read.
        """
        with self._turn:
            there = {name: stamp for name, stamp in self.objects.listing().items() if wanted(name) and not _own(name)}
            changed = [
                name
                for name, stamp in there.items()
                if self._has_changed(name, stamp, look_closely) or (restore and not (self.root / name).is_file())
            ]
            side_by_side(lambda name: self._fetch(name, there[name]), changed)
            for name in [name for name in self._copies if wanted(name) and name not in there]:
                (self.root / name).unlink(missing_ok=True)
                del self._copies[name]
            self._save_index()

    def push(self, wanted: Wanted = lambda _: True) -> None:
        """Copy every wanted file that has changed, and delete the objects of files that no longer exist.

        Logs are copied first, so that they contain every step whose checkpoint is there; then files that are not JSON;
        then JSON; `manifest.json` last: see the package's docstring.

        Raises:
            UserError: the store cannot be written to.
        """
        with self._turn:
            here = {name: each for name, each in self._files().items() if wanted(name)}
            known = {name: each.local for name, each in self._copies.items()}
            changed = {name for name, each in here.items() if known.get(name) != each}
            gone = [name for name in self._copies if wanted(name) and name not in here]
            if not changed and not gone:
                return
            texts = {name for name in changed if name.endswith(".json")} - {MANIFEST}
            logs = {name for name in changed if name.endswith(".jsonl")}
            for some in (logs, changed - logs - texts - {MANIFEST}, texts):
                side_by_side(lambda name: self._send(name, here[name]), sorted(some))
            self.objects.delete(gone)
            for name in gone:
                del self._copies[name]
            if MANIFEST in changed:
                self._send(MANIFEST, here[MANIFEST])
            self._save_index()

    def _has_changed(self, name: str, stamp: Stamp, look_closely: bool) -> bool:
        known = self._copies.get(name)
        if known is None or known.remote != stamp:
            return True
        if not look_closely:
            return False
        return not known.tag or self.objects.tag(name) != known.tag

    def _fetch(self, name: str, stamp: Stamp) -> None:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.parent / f".{target.name}.{uuid4().hex}"
        try:
            if self._cache is None:
                tag = self.objects.download(name, draft)
            else:
                tag = self._cache.fetch(self.objects, name, draft)
            draft.replace(target)
        except FileNotFoundError:  # deleted since it was listed
            return
        finally:
            draft.unlink(missing_ok=True)
        self._copies[name] = _Copy(_local(target), stamp, tag)

    def _send(self, name: str, local: tuple[int, int]) -> None:
        try:
            remote = self.objects.upload(name, self.root / name)
        except FileNotFoundError:  # replaced or removed since: left to the next push
            return
        self._copies[name] = _Copy(local, remote, "")

    def _files(self) -> dict[str, tuple[int, int]]:
        """Finished files, by name; unfinished files begin with a dot."""
        found: dict[str, tuple[int, int]] = {}
        for path in finished_files(self.root):
            name = str(path.relative_to(self.root))
            if not _own(name):
                with suppress(FileNotFoundError):
                    found[name] = _local(path)
        return found

    def _read_index(self) -> dict[str, _Copy]:
        try:
            loaded = json.loads((self.root / INDEX).read_text(encoding="utf-8"))
            return {name: _Copy(tuple(local), Stamp(*remote), tag) for name, (local, remote, tag) in loaded.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _save_index(self) -> None:
        copies = sorted(self._copies.items())
        write_json(self.root / INDEX, {name: [each.local, each.remote, each.tag] for name, each in copies})


def below(places: Iterable[str]) -> Wanted:
    """Selects these files, and everything in these folders."""
    chosen = tuple(places)
    return lambda name: _within(name, chosen)


def all_but(places: Iterable[str]) -> Wanted:
    """Selects everything except these."""
    chosen = tuple(places)
    return lambda name: not _within(name, chosen)


def _within(name: str, places: Sequence[str]) -> bool:
    return any(name == place or name.startswith(f"{place}/") for place in places)


def _own(name: str) -> bool:
    return not may_be_a_file(name) or _within(name, OWN) or name.startswith("work/votes.sqlite")


def _local(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
