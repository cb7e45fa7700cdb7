"""Votes, answers and configs of teachers that are never started."""

from pathlib import Path
from typing import Any

from lorapar_ray.config import LabelConfig
from lorapar_ray.datasets.rows import Row, write_rows
from lorapar_ray.labeling.store import Answer
from lorapar_ray.labeling.votes import (
    Vote,
    normalised,
)


def vote(teacher: str, system: int, confidence: float = 0.8) -> Vote:
    return Vote(teacher, system, confidence, 0.1)


def panel(*names: str, **settings: Any) -> LabelConfig:
    """A config of teachers that are never started."""
    teachers = [{"name": name, "kind": "python", "model": f"simulated:{name}"} for name in names]
    return LabelConfig.model_validate({"teachers": teachers, "calibration": "none", **settings})


def answer(log_odds: float, run: str = "") -> Answer:
    """Votes on two Systems; positive odds mean System 2."""
    return Answer(normalised([0.0, log_odds]), tokens=100, latency_s=0.5, run=run)


def rows_file(folder: Path, count: int) -> Path:
    write_rows(folder / "train.parquet", (Row(f"r{i}", f"q{i}", "1", "1", "sum") for i in range(count)))
    return folder / "train.parquet"
