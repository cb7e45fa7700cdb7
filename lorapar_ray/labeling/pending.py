"""The questions still to be asked, on disk: one Parquet file, one row group per block of work.

The driver writes it while it streams through all questions, workers read their blocks; each holds only one block at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.config import LabelConfig
from lorapar_ray.datasets.rows import Row, iterate_rows
from lorapar_ray.files import atomic_path
from lorapar_ray.labeling.store import Answer, VoteStore, question_key
from lorapar_ray.labeling.voting import Keys, votes_of, whom_to_ask

ANSWER = pa.struct(
    [("log_probs", pa.list_(pa.float64())), ("tokens", pa.int64()), ("latency_s", pa.float64()), ("run", pa.string())]
)
KNOWN = pa.list_(pa.struct([("teacher", pa.string()), ("answers", pa.list_(ANSWER))]))
SCHEMA = pa.schema([("key", pa.string()), ("prompt", pa.string()), ("answer", pa.string()), ("known", KNOWN)])


@dataclass(frozen=True)
class Question:
    """A question that a teacher has not voted on."""

    key: str
    """`question_key`, in hex."""
    prompt: str
    answer: str
    known: dict[str, list[Answer]] = field(default_factory=dict)
    """By teacher, the answers that are stored already, one per rotation of the prompt."""


@dataclass(frozen=True)
class Pending:
    """The result of `write_pending`."""

    blocks: int
    questions: int


def write_pending(
    target: Path,
    rows: Path,
    store: VoteStore,
    label: LabelConfig,
    keys: Keys,
    bias: Mapping[str, list[float]],
    living: list[str],
) -> Pending:
    """Write the questions with missing votes that one of the `living` teachers could give.

    Args:
        target: where to.
        rows: `data/train.parquet` of the run.
        keys: each teacher's cache keys.
        bias: divided out by calibration; sequential voting counts calibrated votes.
    """
    blocks = questions = 0
    unfinished: list[Question] = []
    with atomic_path(target) as draft, pq.ParquetWriter(draft, SCHEMA) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist([_record(question) for question in unfinished], schema=SCHEMA))
            unfinished.clear()

        for chunk, found in answered_rows(rows, store, label.rows_per_block):
            for row, known in zip(chunk, found, strict=True):
                votes = votes_of(label, keys, known, bias)
                voted = {vote.teacher for vote in votes}
                if not whom_to_ask(label, votes, [name for name in living if name not in voted]):
                    continue
                stored = {name: [known[key] for key in keys[name]] for name in voted}
                unfinished.append(Question(question_key(row.prompt, row.answer).hex(), row.prompt, row.answer, stored))
                questions += 1
                if len(unfinished) == label.rows_per_block:
                    flush()
                    blocks += 1
        if unfinished:
            flush()
            blocks += 1
    return Pending(blocks, questions)


def answered_rows(rows: Path, store: VoteStore, size: int) -> Iterator[tuple[list[Row], list[Mapping[bytes, Answer]]]]:
    """Stream `size` rows at a time with the stored answers to each: {teacher key: answer}."""
    stream = iterate_rows(rows)
    while chunk := list(islice(stream, size)):
        keys = [question_key(row.prompt, row.answer) for row in chunk]
        known = store.answers(keys)
        yield chunk, [known.get(key, {}) for key in keys]


class PendingBlocks:
    """Reads blocks of a file that `write_pending` wrote."""

    def __init__(self, path: str) -> None:
        self._file = pq.ParquetFile(path)

    def read(self, block: int) -> list[Question]:
        """The questions of one block."""
        return [
            Question(
                record["key"],
                record["prompt"],
                record["answer"],
                {known["teacher"]: [Answer(**each) for each in known["answers"]] for known in record["known"]},
            )
            for record in self._file.read_row_group(block).to_pylist()
        ]


def _record(question: Question) -> dict[str, Any]:
    known = [
        {"teacher": name, "answers": [vars(answer) for answer in answers]} for name, answers in question.known.items()
    ]
    return {"key": question.key, "prompt": question.prompt, "answer": question.answer, "known": known}
