"""The metrics file of a stage, one JSON line per step; which trackers are installed, and what they report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import read_lines
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path

PROJECT = "lorapar_ray"


def require_trackers(names: Sequence[str], field: str) -> None:
    """Fail before any worker starts, not after; `field` of the config asked for them.

    Raises:
        UserError: a tracker's package is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"{field}: '{name}' is not installed; pip install {name}, or remove it from the list")


def notices_of(metrics: str | Path) -> Path:
    """The file beside a stage's metrics in which a worker writes lines for the user, which the driver prints."""
    return Path(metrics).with_suffix(".notices.txt")


def memory_mib() -> float:
    """Peak memory of this process: allocated on its GPU, or resident on a machine without one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Add one JSON line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8", errors="backslashreplace") as lines:  # a lone surrogate as its JSON escape
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def keep_lines_until(file: Path, step: int) -> None:
    """Drop the lines of steps that a restart from a checkpoint will do again, and a line cut off by a kill."""
    if file.is_file():
        kept = [line for line in read_lines(file) if line.get("step", step) <= step]
        with atomic_path(file) as draft:
            draft.touch()
            for line in kept:
                append_line(draft, line)
