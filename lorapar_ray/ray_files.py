"""The files of a local Ray (sockets, logs, spilled objects): a private directory that is deleted after the run.

A Unix socket's path may have 107 bytes and Ray's own part of it takes 64, so the directory must be a short one:
`$RAY_TMPDIR` if that is set, else `$TMPDIR`, and where that is too long (a cluster's scratch often is) one of
`SHORT_ROOTS` for the sockets, while what needs room, spilled objects, still goes to `$TMPDIR`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorapar_ray.errors import UserError
from lorapar_ray.private_directory import PREFIX, private_directory

RANDOM = 8
"""Characters that `mkdtemp` adds."""
INNER = "r"
SOCKET_BYTES = 107
RAYS_PART = len("/session_2026-11-27_07-53-49_123456_4194304/sockets/plasma_store")
LONGEST_ROOT = SOCKET_BYTES - RAYS_PART - len(f"/{PREFIX}/{INNER}") - RANDOM
"""Bytes of a directory that may hold ours."""
SHORT_ROOTS = ("/tmp", "/dev/shm", "/var/tmp")
ENGINE_FILES = "VLLM_RPC_BASE_PATH"
"""vLLM's variable for the directory of its sockets; a local Ray's engines find its directory there."""


@dataclass(frozen=True)
class RayFiles:
    """The directories of one local Ray."""

    sockets: Path
    """Ray's `_temp_dir`. Ray opens it to all users (0777); only the owner can enter the directory around it (0700)."""
    spilled: Path
    """The folder for objects that no longer fit into memory."""


@contextmanager
def local_files() -> Iterator[RayFiles]:
    """Directories for a local Ray while the block runs; those of killed runs are removed on the way.

    Raises:
        UserError: no directory is short enough and can be written to.
    """
    with ExitStack() as stack:
        roomy = Path(tempfile.gettempdir())
        short = _short_root(roomy)
        sockets = stack.enter_context(private_directory(short))
        spilled = sockets if short == roomy else stack.enter_context(private_directory(roomy))
        yield RayFiles(sockets / INNER, spilled / "spilled")


def _short_root(roomy: Path) -> Path:
    wanted = os.environ.get("RAY_TMPDIR")
    if wanted:
        root = Path(wanted).absolute()
        if not _fits(root):
            raise UserError(
                f"RAY_TMPDIR '{root}' has {len(os.fsencode(root))} bytes; Ray's sockets need a path of at most "
                f"{LONGEST_ROOT}: set a shorter one, or unset it"
            )
        if not _writable(root):
            raise UserError(f"RAY_TMPDIR '{root}' is not a writable directory; set another, or unset it")
        return root
    for root in (roomy, *map(Path, SHORT_ROOTS)):
        if _fits(root) and _writable(root):
            return root
    raise UserError(
        f"no directory for Ray's sockets: TMPDIR '{roomy}' has {len(os.fsencode(roomy))} bytes, and none of "
        f"{', '.join(SHORT_ROOTS)} can be written to; set RAY_TMPDIR to a directory of at most {LONGEST_ROOT} bytes"
    )


def _fits(root: Path) -> bool:
    return len(os.fsencode(root)) <= LONGEST_ROOT


def _writable(root: Path) -> bool:
    return root.is_dir() and os.access(root, os.W_OK | os.X_OK)
