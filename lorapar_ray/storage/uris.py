"""The location of a run: a path, or a folder of an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lorapar_ray.errors import UserError
from lorapar_ray.files import expanded

SCHEMES = ("s3", "gs")
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/")


@dataclass(frozen=True)
class Uri:
    """A folder or an object of a bucket."""

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> Uri:
        return Uri(self.scheme, self.bucket, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """Its last component."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Uri:
        """The folder that contains it."""
        return Uri(self.scheme, self.bucket, self.key.rpartition("/")[0])

    @property
    def path(self) -> str:
        """Bucket and key, in pyarrow's form."""
        return f"{self.bucket}/{self.key}"


def place_of(given: str | Path, field: str = "--run-dir") -> Path | Uri:
    """Parse a user's text: `s3://bucket/folder`, `gs://bucket/folder`, `file:///folder`, or a path.

    Args:
        field: its name in messages.

    Raises:
        UserError: another scheme, no folder, or credentials in it.
    """
    text = str(given)
    if (match := SCHEME.match(text)) is None:
        return Path(given)
    scheme = match[1].lower()
    rest = text[len(match[1]) + 1 :].lstrip("/")
    if scheme == "file":
        return _local(text, field)
    if scheme not in SCHEMES:
        raise UserError(f"{field} '{scheme}://…': no such storage here; give a path, or s3://, gs:// or file://")
    bucket, _, key = rest.partition("/")
    if "@" in bucket or "?" in key:
        raise UserError(f"{field} '{scheme}://…': credentials and options belong in the environment, not here")
    parts = key.rstrip("/").split("/")
    if not bucket or not key or not all(part and part not in (".", "..") for part in parts):
        raise UserError(f"{field} '{text}': write {scheme}://BUCKET/FOLDER")
    return Uri(scheme, bucket, "/".join(parts))


def disk_path(given: str | Path, field: str) -> Path:
    """Parse the place of a command's results, which an object store cannot hold; `~` is expanded.

    Raises:
        UserError: it is a URI of an object store, or as `place_of` and `expanded`.
    """
    place = place_of(given, field)
    if isinstance(place, Uri):
        raise UserError(f"{field} {place}: only a run directory can be in an object store; give a path on a disk")
    return expanded(place, field)


def is_uri(text: str) -> bool:
    """Whether it is a URI of an object store."""
    return text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def _local(text: str, field: str) -> Path:
    found = urlsplit(text)
    if found.netloc not in ("", "localhost") or not found.path.strip("/"):
        raise UserError(f"{field} '{text}': write file:///FOLDER")
    return Path(unquote(found.path))
