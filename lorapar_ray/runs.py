"""The run directory: where each stage writes, what it has finished, and how nothing half-written is ever read.

    runs/<name>/
      config.yaml  manifest.json      resolved config; per stage: status, digest of its inputs, versions, seconds
      data/{train,test}.parquet       the questions as the readers gave them
      labels/  rejects/  adapter/  scores/  partition/  sft/adapter/  grpo/adapter/  eval/  metrics/  report/

Every file appears by an atomic rename, so a reader sees all of it or none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.redact import redact

STAGES = ("label", "score", "partition", "sft", "grpo", "evaluate", "report")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a sibling path to write a file or directory to; on a clean exit it replaces `target`.

    Raises:
        UserError: the disk is full; nothing that was there before is lost.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        draft = scratch / target.name
        yield draft
        if draft.is_dir() and target.is_dir():
            target.rename(scratch / "replaced")
        draft.replace(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left on the disk of '{target}'; free some and run the same command") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(target: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    with atomic_path(target) as draft:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")  # a lone surrogate as its JSON escape


def digest(value: Any) -> str:
    """Hex digest of a JSON-ready value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_files(paths: list[Path]) -> str:
    """Hex digest of files' names and bytes, whatever order they are listed in."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class RunDirectory:
    """Paths and manifest of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.labels = root / "labels"
        self.rejects = root / "rejects"
        self.adapter = root / "adapter"
        self.scores = root / "scores"
        self.partition = root / "partition"
        self.sft = root / "sft"
        self.grpo = root / "grpo"
        self.eval = root / "eval"
        self.metrics = root / "metrics"
        self.report = root / "report"
        self.work = root / "work"
        """Partial results of unfinished stages: units, checkpoints, caches. Safe to delete once a run is done."""

    @property
    def manifest_path(self) -> Path:
        return self.root / "manifest.json"

    def open(self, config: Config) -> None:
        """Create the directory for `config`, or check that it already belongs to it.

        A run may be resumed with other stage settings (the stages they touch are redone), but a directory of another
        model, other data or another name is somebody else's: mixing the two would make results that mean nothing.

        Raises:
            UserError: the directory belongs to another run, or cannot be created.
        """
        path = self.root / "config.yaml"
        identity = {"name": config.name, "model": config.model.path, "data": config.model_dump(mode="json")["data"]}
        known = self.manifest().get("identity")
        if known is not None and known != identity:
            culprit = next(key for key in identity if identity[key] != known.get(key))
            raise UserError(
                f"run directory '{self.root}' belongs to another config (its {culprit} differs); "
                "choose another --run-dir or restore that setting"
            )
        if known is None and self.root.is_dir() and any(self.root.iterdir()):
            raise UserError(f"run directory '{self.root}' is not empty and holds no manifest.json; choose another")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if known is None:
                write_json(self.manifest_path, {"identity": identity, "stages": {}})
            with atomic_path(path) as draft:
                draft.write_text(redact(config.to_yaml()))
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise UserError(f"run directory '{self.root}' cannot be created: {error.strerror}") from error

    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands; empty before the first `open`."""
        if not self.manifest_path.is_file():
            return {}
        loaded: dict[str, Any] = json.loads(self.manifest_path.read_text())
        return loaded

    def record(self, stage: str, **entry: Any) -> None:
        """Replace `stage`'s entry in the manifest."""
        manifest = self.manifest()
        manifest["stages"][stage] = entry
        write_json(self.manifest_path, manifest)

    def outputs_of(self, stage: str) -> list[Path]:
        """The finished files that later stages read from `stage`."""
        folders = {
            "label": [self.labels, self.data],
            "score": [self.scores, self.adapter],
            "partition": [self.partition],
            "sft": [self.sft / "adapter"],
            "grpo": [self.grpo / "adapter"],
            "evaluate": [self.eval],
            "report": [self.report],
        }[stage]
        found = [p for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.is_file()]
        return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(self.root).parts))
