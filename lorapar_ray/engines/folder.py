"""The directory of the engines of a process: sockets of vLLM and of the fork server, notes on a failed start.

vLLM would put them into `$TMPDIR` itself and, since an engine's processes are killed, leave them there. Here each
process that starts engines has a private directory; the next one on the machine removes those of dead ones. A local Ray
holds them in a directory of its own, which is deleted when it ends.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from lorapar_ray.private_directory import PREFIX, private_directory
from lorapar_ray.ray_files import ENGINE_FILES, RANDOM, SHORT_ROOTS, SOCKET_BYTES

LONGEST_ROOT = SOCKET_BYTES - len(f"/{PREFIX}/") - RANDOM - len("01234567-89ab-cdef-0123-456789abcdef")
"""Bytes of a directory that may hold ours, with vLLM's sockets in it."""

_open = ExitStack()
atexit.register(_open.close)


@cache
def engine_folder() -> Path:
    """A directory for the engines of this process, as long as it lives."""
    return _open.enter_context(private_directory(_root(Path(os.environ.get(ENGINE_FILES) or tempfile.gettempdir()))))


@contextmanager
def sockets_in(folder: Path) -> Iterator[None]:
    """vLLM puts its sockets into `folder` while the block runs, also in processes that start in it."""
    before = os.environ.get(ENGINE_FILES)
    os.environ[ENGINE_FILES] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(ENGINE_FILES) if before is None else os.environ.update({ENGINE_FILES: before})


def _root(usual: Path) -> Path:
    """`usual`, or where that has too long a path, a short one."""
    fitting = (root for root in (usual, *map(Path, SHORT_ROOTS)) if len(os.fsencode(root)) <= LONGEST_ROOT)
    return next((root for root in fitting if os.access(root, os.W_OK | os.X_OK)), usual)
