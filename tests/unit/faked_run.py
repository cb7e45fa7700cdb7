"""A run whose stages do no work, by the command line."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from lorapar_ray.runs import RunDirectory
from tests.tiny_run import tiny_config, write_config
from tests.unit.faked_stages import lorapar


class Cli:
    """A run whose stages do no work, and its config."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "rows.jsonl").write_text('{"prompt": "q", "answer": "1"}\n')
        self.tree: dict[str, Any] = {
            **tiny_config(Path("no/such/student")),
            "label": {"strategy": "random"},
            "data": {"train": [{"reader": "file", "path": str(folder / "rows.jsonl")}]},
        }
        self.run = RunDirectory(folder / "run")

    def __call__(self, command: str, *more: str | Path) -> tuple[int, str]:
        config = write_config(self.folder / "config.yaml", self.tree)
        return lorapar(command, "-c", config, "-d", self.run.root, *more)


def everything(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def settled(root: Path) -> None:
    """Files that were written long ago, whose digests are remembered."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 60, time.time() - 60), follow_symlinks=False)


def digests(root: Path) -> dict[str, str]:
    known = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}
    return {str(path.relative_to(root)): found for path, found in known.items() if path.name != "digests.json"}
