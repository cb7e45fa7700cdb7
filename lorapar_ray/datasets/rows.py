"""A question as every stage sees it, and its Parquet form.

All columns are strings: `id`, `prompt`, `response` (what stage 1 imitates), `answer` (what a reward or the evaluation
compares with), `task` and `difficulty` (the source's own words, shown as information and never trained on).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.boundary import damaged, parquet_batches
from lorapar_ray.files import atomic_path

ROWS_PER_WRITE = 4096


@dataclass(frozen=True)
class Row:
    """One question with its answer."""

    id: str
    prompt: str
    response: str
    answer: str
    task: str
    difficulty: str = ""
    messages: str = ""
    """The prompt's messages as JSON, if it is a chat; `prompt` is then its readable form."""
    columns: str = ""
    """The record's columns as JSON, as rewards get them."""


@dataclass(frozen=True)
class Lost:
    """A record that cannot be used."""

    id: str
    reason: str
    row: str


class MadeUpId(str):
    """An id that a reader made from a file's name and a number: it gives way to another one that is the same."""

    __slots__ = ()


OPTIONAL = ("messages", "columns")
"""Not in files of earlier versions."""
COLUMNS: dict[str, type] = {name: str for name in Row.__dataclass_fields__ if name not in OPTIONAL}
ROW_SCHEMA = pa.schema([(name, pa.string()) for name in Row.__dataclass_fields__])


def write_rows(target: Path, rows: Iterable[Row]) -> int:
    """Stream rows into a Parquet file that appears whole or not at all; returns how many there were."""
    iterator = iter(rows)
    count = 0
    with atomic_path(target) as draft, pq.ParquetWriter(draft, ROW_SCHEMA) as writer:
        while chunk := list(islice(iterator, ROWS_PER_WRITE)):
            writer.write_table(pa.Table.from_pylist([asdict(row) for row in chunk], schema=ROW_SCHEMA))
            count += len(chunk)
    return count


def read_table(folder_or_file: Path, columns: Mapping[str, type] | None = None) -> list[dict[str, Any]]:
    """All rows of a Parquet file or of every Parquet file in a folder, in file and row order.

    Args:
        columns: what each must have, and the type of each value.

    Raises:
        UserError: a file is damaged, or lacks some of `columns`.
    """
    files = [folder_or_file] if folder_or_file.is_file() else sorted(folder_or_file.glob("*.parquet"))
    return [row for file in files for batch in parquet_batches(file, columns or {}, ROWS_PER_WRITE) for row in batch]


def iterate_rows(file: Path) -> Iterator[Row]:
    """Stream the rows of a file that `write_rows` wrote.

    Raises:
        UserError: it is missing, damaged, or holds something else.
    """
    for batch in parquet_batches(file, COLUMNS, ROWS_PER_WRITE):
        for row in batch:
            yield Row(**{name: row[name] for name in COLUMNS}, **{name: row.get(name) or "" for name in OPTIONAL})


def count_rows(file: Path) -> int:
    """How many rows a Parquet file holds, from its footer.

    Raises:
        UserError: it is missing or damaged.
    """
    with damaged(file):
        count: int = pq.ParquetFile(file).metadata.num_rows
        return count
