"""The row format of a question for all stages, and its Parquet form.

Text columns: `id`, `prompt`, `response` (stage 1 trains on it), `answer` (rewards and evaluation compare with it),
`task` and `difficulty` (the source's own words, never trained on; charts group by `task`). `messages` is a list of
{role, content}. `columns` holds the record's columns as JSON, in Parquet's own type for it.

Why JSON: rewards and environments must get the very values of the record, and Arrow's columns and structs change them.
A column has one type in a file, so 1 beside 2.5 becomes 1.0, and 1 beside "x" is refused. A struct has the same fields
in each row, so a missing key comes back as None. Integers end at 64 bits, an empty object cannot be written, and
Parquet has no unions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.boundary import REDO, boundary, damaged, parquet_batches
from lorapar_ray.errors import UserError
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
    messages: list[dict[str, str]] = field(default_factory=list)
    """The prompt's messages {role, content}, if it is a chat; `prompt` is then its readable form."""
    columns: str = ""
    """The record's columns as JSON, as rewards get them."""
    system: int | None = None
    """The System that the config gives the row's source."""


@dataclass(frozen=True)
class Lost:
    """A record that cannot be used."""

    id: str
    reason: str
    columns: str
    """As `Row.columns`; empty where the record could not be read."""


class MadeUpId(str):
    """An id that a reader generated from a file's name and a number: it is changed if it is not unique."""

    __slots__ = ()


OPTIONAL = ("messages", "columns", "system")
"""Not in every file: the first two came later, and a System is stored only if the config gives one."""
COLUMNS: dict[str, type] = {name: str for name in Row.__dataclass_fields__ if name not in OPTIONAL}
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TYPES = {"messages": MESSAGES, "columns": pa.json_()}
ROW_SCHEMA = pa.schema([(name, _TYPES.get(name, pa.string())) for name in Row.__dataclass_fields__ if name != "system"])
SYSTEM = pa.field("system", pa.int64())


def write_rows(target: Path, rows: Iterable[Row], *, systems: bool = False) -> int:
    """Stream rows into a Parquet file, written atomically; returns their number.

    Args:
        systems: also store each row's System.
    """
    schema = ROW_SCHEMA.append(SYSTEM) if systems else ROW_SCHEMA
    iterator = iter(rows)
    count = 0
    with atomic_path(target) as draft, pq.ParquetWriter(draft, schema) as writer:
        while chunk := list(islice(iterator, ROWS_PER_WRITE)):
            writer.write_table(pa.Table.from_pylist([as_record(row) for row in chunk], schema=schema))
            count += len(chunk)
    return count


def as_record(row: Row) -> dict[str, Any]:
    """A row as its Parquet columns; no JSON is null, not an empty text."""
    return {**vars(row), "columns": row.columns or None}


def read_table(folder_or_file: Path, columns: Mapping[str, type] | None = None) -> list[dict[str, Any]]:
    """All rows of a Parquet file or of every Parquet file in a folder, in file and row order.

    Args:
        columns: what each must have, and the type of each value.

    Raises:
        UserError: a file is damaged, or lacks some of `columns`.
    """
    files = _files(folder_or_file)
    return [row for file in files for batch in parquet_batches(file, columns or {}, ROWS_PER_WRITE) for row in batch]


def read_columns(folder_or_file: Path, columns: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    """The rows with these columns alone, one chunk in memory; files and errors as of `read_table`."""
    for file in _files(folder_or_file):
        for batch in parquet_batches(file, columns, ROWS_PER_WRITE, only_these=True):
            yield from batch


def _files(folder_or_file: Path) -> list[Path]:
    return [folder_or_file] if folder_or_file.is_file() else sorted(folder_or_file.glob("*.parquet"))


def iterate_rows(file: Path) -> Iterator[Row]:
    """Stream the rows of a file that `write_rows` wrote.

    Raises:
        UserError: it is missing, damaged, or holds something else.
    """
    for batch in parquet_batches(file, COLUMNS, ROWS_PER_WRITE):
        for row in batch:
            yield Row(
                **{name: row[name] for name in COLUMNS},
                messages=messages_in(row),
                columns=row.get("columns") or "",
                system=_system_in(row, file),
            )


def _system_in(row: Mapping[str, Any], file: Path) -> int | None:
    system = row.get("system")
    if system is not None and type(system) is not int:
        raise UserError(f"'{file}': the column 'system' is damaged; {REDO}")
    return system


def messages_in(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a row read from Parquet; empty if the prompt is plain text.

    Earlier versions wrote them as JSON text, or had no such column.

    Raises:
        UserError: it is not a list of messages.
    """
    found = row.get("messages") or []
    with boundary("the column 'messages' of a row is damaged", REDO):
        messages = json.loads(found) if isinstance(found, str) else found
        return [{"role": str(each["role"]), "content": str(each["content"])} for each in messages]


def count_rows(file: Path) -> int:
    """The number of rows in a Parquet file, from its footer.

    Raises:
        UserError: it is missing or damaged.
    """
    with damaged(file):
        count: int = pq.ParquetFile(file).metadata.num_rows
        return count
