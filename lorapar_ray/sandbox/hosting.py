"""A long-running user module in a sandbox; it communicates by standard input and output."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.sandbox.choice import choose
from lorapar_ray.sandbox.layers import Bubblewrap, LayerName, Start, spawn
from lorapar_ray.sandbox.limits import Limits

OPEN_FILES = 1024
TASKS = 1024
"""Numerical libraries start a thread for each core."""


def host(module: str, arguments: Sequence[str], layer: LayerName = "auto") -> subprocess.Popen[bytes]:
    """Start `python -m module arguments`: it can read this process's import path, and nothing else.

    No network, no environment, no file outside `sys.path` and the working directory, nothing writable except a small
    /tmp (bubblewrap only). It must limit its own memory; killing the returned process also ends the processes that it
    started.

    Raises:
        UserError: this machine has no such layer.
    """
    chosen = choose(layer)
    path = [str(Path(each or ".").resolve()) for each in sys.path]
    folders = tuple(each for each in dict.fromkeys(path) if Path(each).exists())
    settings: dict[str, Any] = {"module": module, "arguments": list(arguments), "path": path}
    settings |= {"memory_bytes": None, "open_files": OPEN_FILES}
    forks = isinstance(chosen, Bubblewrap)
    start = Start("hosted", Limits(tasks=TASKS), timed=False, forks=forks, readable=folders, settings=settings)
    return spawn(chosen, start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None)
