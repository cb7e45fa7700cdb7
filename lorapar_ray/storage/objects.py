"""The objects under one URI: list, read, write, delete, with clear errors and retries after network failures."""

from __future__ import annotations

import copy
import errno
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lorapar_ray.errors import UserError
from lorapar_ray.storage.stores import STORES
from lorapar_ray.storage.uris import Uri
from lorapar_ray.text import one_line

AT_ONCE = 8
"""Concurrent transfers."""
PATIENCE_S = 300.0
"""How long a call is retried, once the store has answered."""
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Errors of this machine, not of the store."""
CHUNK = 8 * 2**20
PERMANENT = (
    (("RequestTimeTooSkewed", "REQUEST_TIME_TOO_SKEWED"), "this machine's clock is wrong; set it"),
    (("NO_SUCH_BUCKET", "bucket does not exist"), "there is no such bucket; create it, or name another"),
    (
        (
            "INVALID_ACCESS_KEY",
            "InvalidAccessKeyId",
            "SIGNATURE_DOES_NOT_MATCH",
            "ExpiredToken",
            "INVALID_CLIENT_TOKEN",
        ),
        "the credentials are not accepted; check {credentials} in the environment of this machine",
    ),
    (
        ("ACCESS_DENIED", "Forbidden", "UNAUTHORIZED", "PERMISSION_DENIED", "code: 403", "code: 401"),
        "no permission; check {credentials} in the environment of this machine, and the bucket's policy",
    ),
)

T = TypeVar("T")


class Stamp(NamedTuple):
    """An object's entry in a listing; two writes within a second may have the same stamp."""

    size: int
    mtime_ns: int
    """By the store's clock."""


class Objects:
    """The objects whose names begin with a URI; names are relative to it."""

    def __init__(self, uri: Uri, file_system: Any = None, patience_s: float = PATIENCE_S) -> None:
        """Sends no request yet.

        Args:
            file_system: a `pyarrow.fs.FileSystem`; None: the scheme's default.
            patience_s: how long a call is retried while the store cannot be reached, once it has answered before.

        Raises:
            UserError: this pyarrow does not support such a store.
        """
        self.uri, self._store = uri, STORES[uri.scheme]
        self.file_system = self._connected() if file_system is None else file_system
        self._patience_s, self._once_it_answers_s = 0.0, patience_s
        self._guard: Callable[[], object] | None = None

    def guarded(self, guard: Callable[[], object]) -> Objects:
        """The same objects for a holder that may lose them: `guard` is called before each request and before each retry
        of one, and its error ends the call.
        """
        own = copy.copy(self)
        own._guard = guard
        return own

    def listing(self, under: str = "") -> dict[str, Stamp]:
        """Every object below `under`, by name; empty if there is none.

        Raises:
            UserError: the bucket does not exist, or cannot be reached or read.
        """
        from pyarrow.fs import FileSelector

        root = f"{self.uri.path}/{under}".rstrip("/")
        found = self._ask(
            lambda: self.file_system.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
        )
        start = len(self.uri.path) + 1
        return {each.path[start:]: _stamp(each) for each in found if each.is_file}

    def require_bucket(self) -> None:
        """Check that the store answers, before anything depends on it.

        Raises:
            UserError: it does not answer, or has no such bucket.
        """
        from pyarrow.fs import FileType

        self.listing("lock")  # its error states the reason; a request for only the bucket does not on S3
        if self._ask(lambda: self.file_system.get_file_info(self.uri.bucket)).type is FileType.NotFound:
            raise UserError(f"'{self.uri}': there is no such bucket; create it, or name another")

    def read(self, name: str) -> bytes | None:
        """An object's content; None if it does not exist."""

        def call() -> bytes | None:
            try:
                with self.file_system.open_input_stream(self._path(name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._ask(call)

    def write(self, name: str, content: bytes) -> None:
        """Replace an object."""

        def call() -> None:
            with self._output(name) as stream:
                stream.write(content)

        self._ask(call)

    def upload(self, name: str, file: Path) -> Stamp:
        """Replace an object with a file's content, whole, when all of it is sent.

        A process that is killed during an upload leaves the older object. If the file cannot be read to its end, none
        is left: pyarrow can only close the stream, which makes an object of what was sent, and this is deleted.

        Raises:
            FileNotFoundError: the file no longer exists.
            OSError: it cannot be read.
        """
        file.stat()

        def call() -> Stamp:
            with file.open("rb") as source, self._output(name) as stream:
                shutil.copyfileobj(source, stream, CHUNK)
                size = stream.tell()
            there = _stamp(self.file_system.get_file_info(self._path(name)))
            if there.size != size:
                raise OSError("the store holds a different number of bytes than were sent")
            return there

        return self._ask(call)

    def download(self, name: str, file: Path) -> str:
        """Write an object's content to a file; returns its tag.

        Raises:
            FileNotFoundError: the object no longer exists.
        """

        def call() -> str:
            opened = self._store.opened(self.file_system, self._path(name))
            with opened as (source, tag), file.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
                if target.tell() != source.size():
                    raise OSError("fewer bytes came than the store has")
            return tag

        return self._ask(call)

    def tag(self, name: str) -> str:
        """Equal tags mean equal contents.

        Raises:
            FileNotFoundError: the object no longer exists.
        """
        return self._ask(lambda: self._store.tag(self.file_system, self._path(name)))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; missing ones are not an error."""

        def one(name: str) -> None:
            with suppress(FileNotFoundError):
                self.file_system.delete_file(self._path(name))

        side_by_side(lambda name: self._ask(lambda: one(name)), names)

    def delete_folder(self, name: str) -> None:
        """Delete every object below `name`, if any."""

        def call() -> None:
            with suppress(FileNotFoundError):
                self.file_system.delete_dir(self._path(name))

        if self._store.deletes_folders:
            self._ask(call)
        else:
            self.delete(self.listing(name))

    @contextmanager
    def _output(self, name: str) -> Iterator[Any]:
        """A stream into an object, which is there after the block; a block that raises leaves no part of it."""
        stream = self.file_system.open_output_stream(self._path(name))
        try:
            yield stream
        except BaseException:
            with suppress(Exception):
                stream.close()  # it cannot be dropped, and if this raises the store has nothing new
                if self._guard is not None:
                    self._guard()
                self.file_system.delete_file(self._path(name))
            raise
        stream.close()

    def _path(self, name: str) -> str:
        return f"{self.uri.path}/{name}"

    def _connected(self) -> Any:
        try:
            return self._store.connect(self.uri)
        except ImportError as error:
            raise UserError(
                f"'{self.uri}': this pyarrow is built without object stores ({one_line(error, 80)}); install the lock's"
            ) from error

    def _ask(self, call: Callable[[], T]) -> T:
        """Run `call`; retry while the store cannot be reached, if it was reached before.

        A retry may come minutes after the first try, so the guard is asked before each of them.
        """
        deadline, pause = time.monotonic() + self._patience_s, 0.5
        while True:
            if self._guard is not None:
                self._guard()
            try:
                found = call()
                self._patience_s = self._once_it_answers_s
                return found
            except OSError as error:
                if isinstance(error, FileNotFoundError) or error.errno in OF_THE_DISK:
                    raise
                why, passing = self._why(error)
                if not passing or time.monotonic() + pause > deadline:
                    raise UserError(f"'{self.uri}': {why}") from error
            time.sleep(pause)
            pause = min(2 * pause, 20.0)

    def _why(self, error: OSError) -> tuple[str, bool]:
        """The error in words, and whether it may be temporary."""
        said = str(error)
        for signs, advice in PERMANENT:
            if any(sign in said for sign in signs):
                return advice.format(credentials=self._store.credentials), False
        return f"the object store cannot be reached or does not answer properly ({one_line(said, 200)})", True


def may_be_a_file(name: str) -> bool:
    """Whether an object's name is safe as a path below a folder of a disk: no part is empty or begins with a dot, as
    `..` does."""
    return all(part and not part.startswith(".") for part in name.split("/"))


def side_by_side(function: Callable[[T], Any], each: Iterable[T]) -> None:
    """Call a function on each, `AT_ONCE` at a time; raises the first error."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(function, list(each)):
            pass


def _stamp(info: Any) -> Stamp:
    return Stamp(info.size, info.mtime_ns or 0)
