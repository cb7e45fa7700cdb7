"""The kinds of object store: how to connect to one, and what tells two contents of an object apart.

Credentials come from the environment alone (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`
and others that the SDKs read), on every machine; a pickled file system holds none. `STORAGE_EMULATOR_HOST` names a
server that stands in for Google's and asks for no credentials.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

from lorapar_ray.errors import UserError
from lorapar_ray.storage.uris import Uri
from lorapar_ray.text import one_line

GS_TIME_LIMIT_S = 30.0


class Store(ABC):
    """One kind of store; its methods take pyarrow's file system of it, and whole paths."""

    credentials: ClassVar[str]
    """Environment variables, for messages."""
    deletes_folders: ClassVar[bool]
    """pyarrow deletes everything below a path in one call."""

    @abstractmethod
    def connect(self, uri: Uri) -> Any:
        """A `pyarrow.fs.FileSystem`; sends no request where the environment names the place.

        Raises:
            UserError: the bucket is not found, or the environment names no proper URL.
        """

    @abstractmethod
    def tag(self, file_system: Any, path: str) -> str:
        """Equal tags mean equal contents.

        Raises:
            FileNotFoundError: the object does not exist.
        """

    @contextmanager
    @abstractmethod
    def opened(self, file_system: Any, path: str) -> Iterator[tuple[Any, str]]:
        """A file to read, and a tag that is never newer than what is read; raises as `tag`."""


class S3(Store):
    """Amazon's, and any server that speaks its protocol."""

    credentials = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a store other than AWS)"
    deletes_folders = True

    def connect(self, uri: Uri) -> Any:
        from pyarrow.fs import S3FileSystem, resolve_s3_region

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
                    f"'{uri}': the bucket is not found ({one_line(error, 120)}); check its name, the network, "
                    "AWS_REGION"
                ) from error
        return S3FileSystem(**options, **({"region": region} if region else {}))

    def tag(self, file_system: Any, path: str) -> str:
        with self.opened(file_system, path) as (_, tag):
            return tag

    @contextmanager
    def opened(self, file_system: Any, path: str) -> Iterator[tuple[Any, str]]:
        with file_system.open_input_file(path) as source:
            told = {key.lower(): value for key, value in (source.metadata() or {}).items()}
            if not told.get("etag"):
                raise OSError("the store returns no ETag")
            yield source, str(told["etag"])


class Gs(Store):
    """Google's.

    Its tag is the time of an object's writing, to the millisecond, and its size: the store takes about one write of an
    object per second. The ETag is not asked for: until the store answers, pyarrow would keep the GIL, and all threads
    of this process would wait.
    """

    credentials = "GOOGLE_APPLICATION_CREDENTIALS"
    deletes_folders = False
    """pyarrow would also delete an object of the folder's name, and fails without one."""

    def connect(self, uri: Uri) -> Any:
        from pyarrow.fs import GcsFileSystem

        emulator = os.environ.get("STORAGE_EMULATOR_HOST")
        instead = {"anonymous": True, **_endpoint("STORAGE_EMULATOR_HOST", emulator)} if emulator else {}
        return GcsFileSystem(retry_time_limit=timedelta(seconds=GS_TIME_LIMIT_S), **instead)

    def tag(self, file_system: Any, path: str) -> str:
        found = file_system.get_file_info(path)
        if not found.is_file:
            raise FileNotFoundError(path)
        if found.mtime_ns is None:
            raise OSError("the store returns no time of writing")
        return f"{found.mtime_ns}-{found.size}"

    @contextmanager
    def opened(self, file_system: Any, path: str) -> Iterator[tuple[Any, str]]:
        tag = self.tag(file_system, path)
        with file_system.open_input_file(path) as source:
            yield source, tag


STORES: dict[str, Store] = {"s3": S3(), "gs": Gs()}
"""By URI scheme."""


def _endpoint(variable: str, url: str) -> dict[str, str]:
    """A server's URL, from this variable, as options of a file system."""
    scheme, separator, host = url.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise UserError(f"{variable}={url}: write http://HOST:PORT or https://HOST")
    return {"scheme": scheme, "endpoint_override": host.rstrip("/")}
