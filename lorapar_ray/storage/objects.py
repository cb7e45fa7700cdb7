"""The objects under one URI: list, read, write, delete, with clear errors and retries after network failures.

Credentials come from the environment alone (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`
and others that the SDKs read), on every machine; a pickled file system holds none. `STORAGE_EMULATOR_HOST` names a
server that stands in for Google's and asks for no credentials.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lorapar_ray.errors import UserError
from lorapar_ray.storage.uris import Uri
from lorapar_ray.text import one_line

AT_ONCE = 8
"""Concurrent transfers."""
PATIENCE_S = 300.0
"""How long a call is retried, once the store has answered."""
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Errors of this machine, not of the store."""
GS_TIME_LIMIT_S = 30.0
CHUNK = 8 * 2**20
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a store other than AWS)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}
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
        self.uri = uri
        self.file_system = _file_system(uri) if file_system is None else file_system
        self._patience_s, self._once_it_answers_s = 0.0, patience_s

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
            with self.file_system.open_output_stream(self._path(name)) as stream:
                stream.write(content)

        self._ask(call)

    def upload(self, name: str, file: Path) -> Stamp:
        """Replace an object with a file's content; it appears whole.

        Raises:
            FileNotFoundError: the file no longer exists.
        """
        file.stat()

        def call() -> Stamp:
            with file.open("rb") as source, self.file_system.open_output_stream(self._path(name)) as stream:
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
            tag = self._written(name) if self.uri.scheme == "gs" else ""  # never newer than what is read next
            with self.file_system.open_input_file(self._path(name)) as source, file.open("wb") as target:
                tag = tag or _etag(source)
                shutil.copyfileobj(source, target, CHUNK)
                if target.tell() != source.size():
                    raise OSError("fewer bytes came than the store has")
            return tag

        return self._ask(call)

    def tag(self, name: str) -> str:
        """Equal tags mean equal contents: an object's ETag, or in Google's store the time of its writing.

        Raises:
            FileNotFoundError: the object no longer exists.
        """

        def call() -> str:
            if self.uri.scheme == "gs":
                return self._written(name)
            with self.file_system.open_input_file(self._path(name)) as source:
                return _etag(source)

        return self._ask(call)

    def _written(self, name: str) -> str:
        """When an object of Google's store was written, to the millisecond, and its size.

        That store takes about one write of an object per second. The ETag is not asked for: until that store answers,
        pyarrow would keep the GIL, and all threads of this process would wait.

        Raises:
            FileNotFoundError: the object does not exist.
        """
        found = self.file_system.get_file_info(self._path(name))
        if not found.is_file:
            raise FileNotFoundError(name)
        if found.mtime_ns is None:
            raise OSError("the store returns no time of writing")
        return f"{found.mtime_ns}-{found.size}"

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

        if self.uri.scheme == "gs":  # where pyarrow also deletes an object of the folder's name, and fails without one
            self.delete(self.listing(name))
        else:
            self._ask(call)

    def _path(self, name: str) -> str:
        return f"{self.uri.path}/{name}"

    def _ask(self, call: Callable[[], T]) -> T:
        """Run `call`; retry while the store cannot be reached, if it was reached before."""
        deadline, pause = time.monotonic() + self._patience_s, 0.5
        while True:
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
                return advice.format(credentials=CREDENTIALS[self.uri.scheme]), False
        return f"the object store cannot be reached or does not answer properly ({one_line(said, 200)})", True


def side_by_side(function: Callable[[T], Any], each: Iterable[T]) -> None:
    """Call a function on each, `AT_ONCE` at a time; raises the first error."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(function, list(each)):
            pass


def _stamp(info: Any) -> Stamp:
    return Stamp(info.size, info.mtime_ns or 0)


def _etag(source: Any) -> str:
    told = {key.lower(): value for key, value in (source.metadata() or {}).items()}
    if not told.get("etag"):
        raise OSError("the store returns no ETag")
    return str(told["etag"])


def _file_system(uri: Uri) -> Any:
    try:
        from pyarrow.fs import GcsFileSystem, S3FileSystem, resolve_s3_region
    except ImportError as error:
        raise UserError(
            f"'{uri}': this pyarrow is built without object stores ({one_line(error, 80)}); install the lock's"
        ) from error
    if uri.scheme == "gs":
        from datetime import timedelta

        emulator = os.environ.get("STORAGE_EMULATOR_HOST")
        instead = {"anonymous": True, **_endpoint("STORAGE_EMULATOR_HOST", emulator)} if emulator else {}
        return GcsFileSystem(retry_time_limit=timedelta(seconds=GS_TIME_LIMIT_S), **instead)
    options: dict[str, Any] = {"allow_delayed_open": True}  # a small object in one request
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        options |= _endpoint("AWS_ENDPOINT_URL", endpoint)
    elif not region:
        try:
            region = resolve_s3_region(uri.bucket)
        except OSError as error:
            raise UserError(
                f"'{uri}': the bucket is not found ({one_line(error, 120)}); check its name, the network, AWS_REGION"
            ) from error
    return S3FileSystem(**options, **({"region": region} if region else {}))


def _endpoint(variable: str, url: str) -> dict[str, str]:
    """A server's URL, from this variable, as options of a file system."""
    scheme, separator, host = url.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise UserError(f"{variable}={url}: write http://HOST:PORT or https://HOST")
    return {"scheme": scheme, "endpoint_override": host.rstrip("/")}
