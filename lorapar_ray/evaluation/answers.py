"""A model's answers, saved when they arrive, so that an interrupted evaluation can resume.

A folder of Parquet shards, each written atomically. A shard holds answers that arrived together, so a killed driver
loses only the questions in flight. Small shards are regularly merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.boundary import damaged
from lorapar_ray.engines.requests import ANSWER_SCHEMA, Answer, Request, answer_table, answers_of
from lorapar_ray.files import atomic_path

MERGED_FROM = 64
"""Number of shards that are merged."""
DELETE = "delete it; its questions are then asked again"


class AnswerStore:
    """Answers of one model, by the key of their request."""

    def __init__(self, folder: Path | None) -> None:
        """Read what `folder`, which may not exist yet, holds; None: keep them in memory alone.

        Raises:
            UserError: a shard is damaged.
        """
        self._folder = folder
        self._answers: dict[str, Answer] = {}
        self._small: list[Path] = []
        for shard in sorted([] if folder is None else folder.glob("*.parquet")):
            with damaged(shard, DELETE):
                table = pq.read_table(shard, schema=ANSWER_SCHEMA)
                self._answers |= {answer.key: answer for answer in answers_of(table)}
            self._small.append(shard)

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """The requests without an answer, each once."""
        return list({request.key: request for request in requests if request.key not in self._answers}.values())

    def add(self, answers: Sequence[Answer]) -> None:
        """Save some answers; they are on disk when this returns."""
        self._answers |= {answer.key: answer for answer in answers}
        if self._folder is None:
            return
        self._small.append(self._write(self._folder, answer_table(answers)))
        if len(self._small) >= MERGED_FROM:
            tables = [pq.read_table(shard, schema=ANSWER_SCHEMA) for shard in self._small]
            # until the merged parts are deleted their answers exist twice
            merged = self._write(self._folder, pa.concat_tables(tables))
            for shard in self._small:
                shard.unlink()
            self._small = [merged]

    @staticmethod
    def _write(folder: Path, table: pa.Table) -> Path:
        shard = folder / f"{uuid4().hex}.parquet"
        with atomic_path(shard) as draft:
            pq.write_table(table, draft)
        return shard
