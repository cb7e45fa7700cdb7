"""A run's labelled questions as tokens: an Arrow file that is written once and read memory-mapped by every stage.

    work/tokens.arrow     id, system, start (where the response begins), input_ids; rows as in labels/, whole

Readers cut a row to their own `max_length`. Nothing of it lies in a process's own memory but a length and a System for
each row, and the operating system shares its pages among the workers of a machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lorapar_ray.datasets.chat import Encoder, Prompt
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS_PER_BATCH = 1024
SCHEMA = pa.schema(
    [("id", pa.string()), ("system", pa.int8()), ("start", pa.int32()), ("input_ids", pa.list_(pa.int32()))]
)


def write_tokens(
    batches: Iterable[list[dict[str, Any]]],
    asked: Callable[[dict[str, Any]], Prompt],
    encoder: Encoder,
    target: Path,
    key: str,
) -> int:
    """Tokenise labelled rows into `target`, which appears whole; returns how many there were.

    Args:
        batches: rows with `id`, `response`, `system` and what `asked` makes a prompt of, some at a time.
        key: what the tokens were made from; `key_of` reads it back.
    """
    schema = SCHEMA.with_metadata({"key": key})
    count = 0
    with atomic_path(target) as draft, pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for rows in batches:
            encoded = encoder.examples([asked(row) for row in rows], [row["response"] for row in rows])
            columns = {
                "id": [row["id"] for row in rows],
                "system": [row["system"] for row in rows],
                "start": [start for _, start in encoded],
                "input_ids": [ids for ids, _ in encoded],
            }
            writer.write_batch(pa.record_batch(columns, schema=schema))
            count += len(rows)
    return count


def key_of(path: Path) -> str | None:
    """What the tokens of `path` were made from; None if there is no whole file."""
    try:
        with pa.memory_map(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    found: bytes | None = metadata.get(b"key")
    return None if found is None else found.decode()


class TokenTable:
    """The rows of a token file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        chunks = table.column("input_ids").chunks
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._first = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._ids = table.column("id")
        self.systems: NDArray[np.int8] = table.column("system").to_numpy()
        """[rows]"""
        self.starts: NDArray[np.int32] = table.column("start").to_numpy()
        """[rows]: where each response begins."""
        self.lengths: NDArray[np.int32] = (
            np.concatenate([np.diff(offsets) for offsets in self._offsets]) if chunks else np.zeros(0, np.int32)
        )
        """[rows]: tokens of each."""

    def __len__(self) -> int:
        return len(self.systems)

    def id(self, row: int) -> str:
        found: str = self._ids[row].as_py()
        return found

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Prompt and response of a row, a view of the file."""
        chunk = int(np.searchsorted(self._first, row, side="right")) - 1
        start, end = self._offsets[chunk][row - self._first[chunk] :][:2]
        return self._values[chunk][start:end]

    def of(self, systems: Sequence[int]) -> NDArray[np.int64]:
        """Positions of the rows of some Systems, in the order they were labelled."""
        return np.flatnonzero(np.isin(self.systems, list(systems)))


@dataclass(frozen=True)
class Selection:
    """Which rows of a token file a job sees, and in which order; every worker works it out from the file."""

    path: str
    systems: list[int]
    field: str
    """The setting that names the Systems, for messages."""
    max_length: int
    sample: int | None = None
    """So many rows of each System, one System after the other; None: all."""
    shuffled: bool = False
    """Each System's rows in a seeded order before the sample is taken."""
    seed: int = 0

    def positions(self, table: TokenTable) -> list[int]:
        """Positions in `table` of the rows whose prompt leaves room for an answer.

        Raises:
            UserError: no row belongs to these Systems.
        """
        return self.split(table)[0]

    def split(self, table: TokenTable) -> tuple[list[int], list[int]]:
        """`positions`, and those of the rows that are left out since their prompt is too long."""
        if not self.shuffled:
            chosen = self._some(table, self.systems).tolist()
        else:
            chosen = []
            for system in self.systems:
                rows = self._some(table, [system]).tolist()
                random.Random(f"{self.seed}/score/{system}").shuffle(rows)
                chosen += rows[: self.sample]
        fits = (table.starts[chosen] < self.max_length).tolist()
        sides: tuple[list[int], list[int]] = ([], [])
        for row, fit in zip(chosen, fits, strict=True):
            sides[not fit].append(row)
        return sides

    def _some(self, table: TokenTable, systems: list[int]) -> NDArray[np.int64]:
        rows = table.of(systems)
        if not len(rows):
            raise UserError(
                f"{self.field}: no row of the labels is labelled System {' or '.join(map(str, systems))}; "
                "look at the vote in the report, and at label.examples and label.calibration"
            )
        return rows


class Examples(Sequence[dict[str, Any]]):
    """Rows of a token table as {input_ids, response_start}, cut to `max_length` when they are read."""

    def __init__(self, table: TokenTable, positions: Sequence[int], max_length: int) -> None:
        self._table, self._positions, self._max_length = table, positions, max_length

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = np.minimum(self._table.lengths[list(self._positions)], self._max_length).tolist()
        return lengths

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = self._positions[index]
        ids = self._table.tokens(row)[: self._max_length]
        return {"input_ids": ids.tolist(), "response_start": int(self._table.starts[row])}
