"""Where the results of lm-eval's tasks lie below an evaluation's folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def result_file(root: Path, model: str, task: str) -> Path:
    """Where the shares of a task are written; written last."""
    return root / "tasks" / model / f"{file_name(task)}.json"


def rows_file(root: Path, model: str, task: str) -> Path:
    """Where its rows are written."""
    return root / "rows" / model / f"{file_name(task)}.parquet"


def file_name(task: str) -> str:
    """A task's name as a file name; for a task file, that file's name."""
    name, at, shots = task.partition("@")
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    return re.sub(r"[^\w.-]+", "_", stem) + at + shots


def unfinished(root: Path, models: Sequence[str], tasks: Sequence[str]) -> list[tuple[str, str]]:
    """(model, task) pairs without a result."""
    return [(model, task) for model in models for task in tasks if not result_file(root, model, task).is_file()]
