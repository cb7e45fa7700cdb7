"""A run's questions as tokens: an Arrow file that is written once and read memory-mapped by every stage.

    work/tokens.arrow     id, system, start (where the response begins), input_ids; rows as in labels/, whole;
                          and for rewards and evaluation the columns of `TEXTS`
    work/test.arrow       the same of the test rows, whose system is 0

Readers cut a row to their own `max_length`. A process holds three numbers for each row in its own memory; the operating
system shares the file's pages among the processes of a machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lorapar_ray.datasets.chat import Encoder, Prompt
from lorapar_ray.datasets.rows import ROW_SCHEMA, messages_in
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS_PER_BATCH = 1024
TEXTS = ("prompt", "response", "answer", "task", "difficulty", "messages", "columns")
"""Columns of a question for rewards and evaluation."""
UNLABELLED = 0
"""The System of a row without a label (a test row)."""
SCHEMA = pa.schema(
    [
        *(("id", pa.string()), ("system", pa.int8()), ("start", pa.int32()), ("input_ids", pa.list_(pa.int32()))),
        *(ROW_SCHEMA.field(name) for name in TEXTS),
    ]
)


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The model's input: the row's messages if it is a chat, else its prompt."""
    text: str = row["prompt"]
    return messages_in(row) or text


def write_tokens(
    batches: Iterable[list[dict[str, Any]]], encoder: Encoder, target: Path, key: str, *, labelled: bool = True
) -> int:
    """Tokenise rows into `target`, written atomically; returns their number.

    Args:
        batches: labelled rows or test rows, as read from Parquet in chunks.
        key: identifies the tokens' source; `key_of` reads it back.
        labelled: False: of test rows, which have no label, also if their source has a System.
    """
    schema = SCHEMA.with_metadata({"key": key})
    count = 0
    with atomic_path(target) as draft, pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for rows in batches:
            encoded = encoder.examples([prompt_of(row) for row in rows], [row["response"] for row in rows])
            columns = {
                "id": [row["id"] for row in rows],
                "system": [row["system"] if labelled else UNLABELLED for row in rows],
                "start": [start for _, start in encoded],
                "input_ids": [ids for ids, _ in encoded],
                **{name: [row.get(name) or None for row in rows] for name in TEXTS},
                "messages": [messages_in(row) for row in rows],
            }
            writer.write_batch(pa.record_batch(columns, schema=schema))
            count += len(rows)
    return count


def key_of(path: Path) -> str | None:
    """The key of the tokens in `path`; None if the file is missing, truncated or of an earlier version."""
    try:
        with pa.memory_map(str(path)) as source:
            schema = pa.ipc.open_file(source).schema
    except (OSError, ValueError, pa.ArrowException):
        return None
    if schema.names != SCHEMA.names:
        return None
    found: bytes | None = (schema.metadata or {}).get(b"key")
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
        self._texts = {name: table.column(name) for name in TEXTS}
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

    def question(self, row: int) -> dict[str, Any]:
        """A row's id and `TEXTS`, and the token ids of its prompt (`prompt_ids`)."""
        texts = {name: column[row].as_py() or "" for name, column in self._texts.items()}
        return {"id": self.id(row), **texts, "prompt_ids": self.prompt_ids(row).tolist()}

    def prompt_ids(self, row: int) -> NDArray[np.int32]:
        """Tokens of a row's prompt, a view of the file."""
        return self.tokens(row)[: self.starts[row]]

    def of(self, systems: Sequence[int]) -> NDArray[np.int64]:
        """Positions of the rows of some Systems, in the order they were labelled."""
        return np.flatnonzero(np.isin(self.systems, list(systems)))


@dataclass(frozen=True)
class Selection:
    """The rows of a token file that a job uses, in order; every worker computes them from the file."""

    path: str
    systems: list[int]
    field: str
    """The setting that names the Systems, for messages."""
    max_length: int
    sample: int | None = None
    """Number of rows of each System, one System after the other; None: all."""
    shuffled: bool = False
    """Each System's rows in a seeded order before the sample is taken."""
    seed: int = 0

    def positions(self, table: TokenTable) -> NDArray[np.int64]:
        """Positions in `table` of the rows whose prompt leaves room for an answer.

        Raises:
            UserError: no row belongs to these Systems.
        """
        return self.split(table)[0]

    def split(self, table: TokenTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`positions`, and the positions of rows that are skipped because their prompt is too long."""
        if not self.shuffled:
            chosen = self._some(table, self.systems)
        else:
            parts = []
            for system in self.systems:
                rows = self._some(table, [system])
                random.Random(f"{self.seed}/score/{system}").shuffle(rows)  # type: ignore[arg-type]
                parts.append(rows[: self.sample])
            chosen = np.concatenate(parts)
        fits = table.starts[chosen] < self.max_length
        return chosen[fits], chosen[~fits]

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

    def __init__(self, table: TokenTable, positions: NDArray[np.int64], max_length: int) -> None:
        self._table, self._positions, self._max_length = table, positions, max_length

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = np.minimum(self._table.lengths[self._positions], self._max_length).tolist()
        return lengths

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = int(self._positions[index])
        ids = self._table.tokens(row)[: self._max_length]
        return {"input_ids": ids.tolist(), "response_start": int(self._table.starts[row])}


class Questions(Sequence[dict[str, Any]]):
    """The rows of a selection as `TokenTable.question` gives them, read on demand; only the selection is sent to
    workers."""

    def __init__(self, chosen: Selection) -> None:
        self.chosen = chosen

    def __reduce__(self) -> tuple[Any, ...]:
        return Questions, (self.chosen,)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self._table.question(int(self._positions[index]))

    def prompt_ids(self, index: int) -> NDArray[np.int32]:
        """Tokens of a question's prompt, a view of the file; no text is read."""
        return self._table.prompt_ids(int(self._positions[index]))

    def excerpt(self, index: int, tokens: int, of_response: int) -> list[int]:
        """At most `tokens` token ids: the prompt's last ones, and at most `of_response` of the response's."""
        row = int(self._positions[index])
        end = int(self._table.starts[row]) + of_response
        ids: list[int] = self._table.tokens(row)[:end][-tokens:].tolist()
        return ids

    @cached_property
    def _table(self) -> TokenTable:
        return TokenTable(Path(self.chosen.path))

    @cached_property
    def _positions(self) -> NDArray[np.int64]:
        return self.chosen.positions(self._table)


def prompt_ids_of(questions: Sequence[dict[str, Any]], index: int) -> Sequence[int] | NDArray[np.int32]:
    """Tokens of a question's prompt; of `Questions`, without its texts."""
    found: Sequence[int] | NDArray[np.int32]
    found = questions.prompt_ids(index) if isinstance(questions, Questions) else questions[index]["prompt_ids"]
    return found
