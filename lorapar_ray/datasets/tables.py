"""Parquet tables written row by row, with one chunk in memory; and the reject table of all stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.datasets.rows import ROW_SCHEMA, ROWS_PER_WRITE, Lost, Row, messages_in

OF_A_ROW = tuple(name for name in ROW_SCHEMA.names if name != "id")
REJECT_SCHEMA = pa.schema(
    [("id", pa.string()), ("stage", pa.string()), ("reason", pa.string()), *(ROW_SCHEMA.field(n) for n in OF_A_ROW)]
)
"""A rejected row, with the columns of any other row; for a record that is not a row only `columns` is filled."""


class TableWriter:
    """A Parquet file that grows by chunks."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(file, schema)
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self.count = 0

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.count += 1
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_WRITE:
            self._flush()

    def close(self) -> None:
        """Write the remaining rows and the file's footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows.clear()


def reject(row: Row | Lost | Mapping[str, Any], stage: str, reason: str) -> dict[str, Any]:
    """A line of the reject table.

    Args:
        row: a question, also as read from Parquet, or a record that is not a question.
    """
    values = row if isinstance(row, Mapping) else vars(row)
    own = {name: values.get(name) or None for name in OF_A_ROW}
    return {"id": values["id"], "stage": stage, "reason": reason, **own, "messages": messages_in(values)}


@contextmanager
def reject_table(target: Path) -> Iterator[TableWriter]:
    """`target` is written when the block ends without an error, and only if a row was added; an older file is
    deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft")
    try:
        table = TableWriter(draft, REJECT_SCHEMA)
        yield table
        table.close()
        if table.count:
            draft.replace(target)
        else:
            target.unlink(missing_ok=True)
    finally:
        draft.unlink(missing_ok=True)
