"""A machine's cache of objects: its processes together download each object once, where files can be locked."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

from lorapar_ray.errors import UserError
from lorapar_ray.files import cache_root
from lorapar_ray.storage.objects import Objects, may_be_a_file
from lorapar_ray.storage.uris import Uri, is_uri, place_of

REPLACED_WHOLE = (".safetensors", ".parquet", ".arrow", ".bin", ".model")
"""These files are never written in place, so a hard link serves as a copy."""
UNUSED_S = 7 * 24 * 3600.0


class Cache:
    """`$LORAPAR_CACHE/objects`: files by URI and tag."""

    def __init__(self) -> None:
        self._root = cache_root() / "objects"
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def fetch(self, objects: Objects, name: str, target: Path) -> str:
        """Write an object's content to `target`; returns its tag.

        Raises:
            FileNotFoundError: the object no longer exists.
        """
        tag = objects.tag(name)
        key = _key(objects, name, tag)
        # not named by the process: containers, or machines, that share a cache have equal pids
        kept, draft = self._root / key, self._root / f".{key}.{uuid.uuid4().hex}"
        with (self._root / f".{key}.lock").open("w", encoding="utf-8") as turn:
            with suppress(OSError):  # a file system without locks: several processes may download it, each its own
                fcntl.flock(turn, fcntl.LOCK_EX)
            if not kept.is_file():
                try:
                    tag = objects.download(name, draft)
                    kept = self._root / _key(objects, name, tag)  # another tag if the object was replaced meanwhile
                    draft.replace(kept)
                finally:
                    draft.unlink(missing_ok=True)
            os.utime(kept)
            _copied(kept, target, name)
        return tag

    def file(self, objects: Objects, name: str) -> Path:
        """One object as a file.

        Raises:
            FileNotFoundError: the object no longer exists.
        """
        with tempfile.TemporaryDirectory(dir=self._root, prefix=".") as folder:
            tag = self.fetch(objects, name, Path(folder) / "file")
        return self._root / _key(objects, name, tag)

    def folder(self, objects: Objects) -> Path:
        """A folder with the objects under a URI, without those whose names are no safe paths (`may_be_a_file`); the
        same folder while the objects are unchanged."""
        there = sorted(filter(may_be_a_file, objects.listing()))
        target = self._root / _folder_name(objects, {name: objects.tag(name) for name in there})
        if not target.is_dir():
            # not named by the process: containers that share a cache have equal pids
            draft = Path(tempfile.mkdtemp(prefix=".folder-", dir=self._root))
            try:
                tags = {}
                for name in there:
                    (draft / name).parent.mkdir(parents=True, exist_ok=True)
                    tags[name] = self.fetch(objects, name, draft / name)
                target = self._root / _folder_name(objects, tags)
                try:
                    draft.rename(target)
                except OSError:
                    if not target.is_dir():
                        raise  # else another process was faster
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        os.utime(target)
        return target

    def remove_unused(self) -> None:
        """Remove files that were not used for a week; hard links to them stay valid."""
        for each in self._root.iterdir():
            with suppress(OSError):
                if time.time() - each.stat().st_mtime > UNUSED_S:
                    shutil.rmtree(each) if each.is_dir() else each.unlink()


def _key(objects: Objects, name: str, tag: str) -> str:
    return hashlib.sha256(f"{objects.uri / name} {tag}".encode()).hexdigest()[:32]


def _folder_name(objects: Objects, tags: dict[str, str]) -> str:
    keys = " ".join(_key(objects, name, tag) for name, tag in tags.items())
    return f"folder-{hashlib.sha256(keys.encode()).hexdigest()[:32]}"


def _copied(kept: Path, target: Path, name: str) -> None:
    if name.endswith(REPLACED_WHOLE):
        try:
            os.link(kept, target)
            return
        except OSError:  # another file system
            pass
    shutil.copyfile(kept, target)


def on_this_machine(place: str | Path) -> Path:
    """A local path: a path unchanged; a file or a folder of an object store as its local copy.

    Raises:
        UserError: it cannot be read, or does not exist.
    """
    if not is_uri(str(place)):
        return Path(place)
    uri = place_of(place, "model")
    assert isinstance(uri, Uri)
    cache, objects = Cache(), Objects(uri)
    if objects.listing():
        return cache.folder(objects)
    try:
        return cache.file(Objects(uri.parent, objects.file_system), uri.name)
    except FileNotFoundError as error:
        raise UserError(f"'{uri}': there is no such object") from error
