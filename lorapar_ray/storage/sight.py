"""Waits until this machine sees what a worker on another one has written."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from lorapar_ray.errors import UserError
from lorapar_ray.storage.workspace import refresh

LIMIT_S = 90.0
"""NFS shows a change after at most a minute (`acdirmax`)."""
LOOK_EVERY_S = 1.0


def wait_until_seen(path: Path, seen: Callable[[], bool]) -> None:
    """Until `seen()`, which looks at `path`; in an object store it is fetched.

    Raises:
        UserError: `LIMIT_S` have passed.
    """
    deadline = time.monotonic() + LIMIT_S
    while not seen():
        if time.monotonic() > deadline:
            raise UserError(
                f"'{path}' is not there on {socket.gethostname()} {LIMIT_S:.0f} s after the first worker has seen it; "
                "check that all nodes see the same run directory, and run the same command again"
            )
        refresh(str(path))
        if not seen():
            time.sleep(LOOK_EVERY_S)
