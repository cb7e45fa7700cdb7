"""A worker's temporary copy of a run in an object store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.files import cache_root
from lorapar_ray.private_directory import private_directory
from lorapar_ray.storage.cache import Cache
from lorapar_ray.storage.mirror import Mirror, all_but, below
from lorapar_ray.storage.objects import Objects
from lorapar_ray.storage.uris import Uri
from lorapar_ray.threads import meanwhile

PUSH_EVERY_S = 5.0
UNREAD = (
    *("trash", "report", "eval", "rejects", "scores", "manifest.json", "config.yaml"),
    *("work/label", "work/votes", "work/evaluate"),
)
"""Parts of a run that no worker reads."""

_here: list[Workspace] = []
"""This process's workspaces."""


@dataclass(frozen=True)
class Handed:
    """What a worker gets to know of the run; sent pickled."""

    uri: Uri
    root: str
    """The driver's mirror: the paths in a worker's task begin with it, or with the URI."""
    writes: tuple[str, ...]
    """Files and folders, relative to the run, that the task may write."""


class Workspace:
    """A mirror; the worker writes a part of it."""

    def __init__(self, handed: Handed, root: Path) -> None:
        cache = Cache()
        cache.remove_unused()
        self._handed, self._wanted = handed, below(handed.writes)
        self._mirror = Mirror(root, Objects(handed.uri), cache)
        self._mirror.pull(all_but(UNREAD))

    def publish(self) -> None:
        """Copy what the worker has written to the store."""
        self._mirror.push(self._wanted)

    def refresh(self, path: Path) -> None:
        """Fetch what another worker has published at a path, if the path is in this workspace."""
        if path.is_relative_to(self._mirror.root):
            self._mirror.pull(below([str(path.relative_to(self._mirror.root))]))

    def rebased(self, value: Any) -> Any:
        """JSON-like values, with paths in the driver's mirror replaced by paths in this one."""
        if isinstance(value, dict):
            return {key: self.rebased(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.rebased(each) for each in value)
        if isinstance(value, str | Path):
            for root in (self._handed.root, str(self._handed.uri)):
                if str(value) == root or str(value).startswith(f"{root}/"):
                    return type(value)(f"{self._mirror.root}{str(value)[len(root) :]}")
        return value


@contextmanager
def workspace(handed: Handed | None) -> Iterator[Callable[[Any], Any]]:
    """Work on a copy of the run while the block runs; yields `Workspace.rebased`.

    What the block writes is published every `PUSH_EVERY_S`, and at its end, also if it fails.

    Args:
        handed: None: the run is on a disk that this process sees; values stay unchanged.

    Raises:
        UserError: the store cannot be read or written.
    """
    if handed is None:
        yield lambda value: value
        return
    with private_directory(_folder()) as folder:
        own = Workspace(handed, folder / "run")
        _here.append(own)
        try:
            with meanwhile(partial(_try_to_publish, own), every_s=PUSH_EVERY_S):
                yield own.rebased
        finally:
            _here.remove(own)
            own.publish()


def publish() -> None:
    """Let the workers on other machines see what this one has written; does nothing on a shared disk."""
    for own in _here:
        own.publish()


def refresh(path: str) -> None:
    """Fetch what another worker has published; does nothing on a shared disk."""
    for own in _here:
        own.refresh(Path(path))


def _folder() -> Path:
    folder = cache_root() / "workspaces"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _try_to_publish(own: Workspace) -> None:
    try:
        own.publish()
    except UserError as error:  # only an error of the last push is raised
        print(f"lorapar: {error}; trying again", flush=True)
