"""The rows of every benchmark: one per comparison, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement and its peer's, from the same run."""

    name: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    goal: str
    met: bool | None
    """None: measured without a goal."""


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows, aligned."""
    head = ("name", "ours", "peer", "unit", "ratio", "goal", "met")
    cells = [head, *(tuple(_cell(value) for value in asdict(row).values()) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write {"rows": [...]} as JSON."""
    path.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n", encoding="utf-8")


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
