"""Write a run's questions once, train and test disjoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.config import Config, Source
from lorapar_ray.datasets.rows import Row, write_rows
from lorapar_ray.datasets.sources import read_source
from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory, atomic_path


def prepare(config: Config, run: RunDirectory) -> dict[str, int]:
    """Write `data/train.parquet` and `data/test.parquet`.

    A training row whose prompt is also a test row's, or appeared before, goes to `rejects/prepare.parquet`: a model
    must not be tested on what it was trained on. Memory grows with a 16-byte digest per row, not with the text.

    Returns:
        counts of `train`, `test` and `rejected` rows.

    Raises:
        UserError: see `read_source`; or two rows share an id, or no training row is left.
    """
    seen: set[bytes] = set()
    rejected: list[dict[str, str]] = []

    def fresh(part: str, sources: list[Source]) -> Iterator[Row]:
        ids: set[bytes] = set()
        for index, source in enumerate(sources):
            for row in read_source(source, f"data.{part}[{index}]"):
                if (key := _key(row.id)) in ids:
                    raise UserError(f"data.{part}[{index}]: id '{row.id}' appears twice; ids must be unique")
                ids.add(key)
                if (key := _key(row.prompt)) in seen:
                    rejected.append(_reject(row, part))
                    continue
                seen.add(key)
                yield _instructed(row, config.data.instruction)

    counts = {"test": write_rows(run.data / "test.parquet", fresh("test", config.data.test))}
    counts["train"] = write_rows(run.data / "train.parquet", fresh("train", config.data.train))
    if counts["train"] == 0:
        raise UserError("data.train: every row is a duplicate or also in data.test; nothing is left to train on")
    if rejected:
        with atomic_path(run.rejects / "prepare.parquet") as draft:
            pq.write_table(pa.Table.from_pylist(rejected), draft)
    return counts | {"rejected": len(rejected)}


def _key(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def _instructed(row: Row, instruction: str | None) -> Row:
    return row if instruction is None else Row(**{**asdict(row), "prompt": f"{row.prompt}\n{instruction}"})


def _reject(row: Row, part: str) -> dict[str, str]:
    reason = "duplicate prompt" if part == "test" else "prompt also in the test rows, or a duplicate"
    return {"id": row.id, "stage": "prepare", "reason": reason, "row": json.dumps(asdict(row), ensure_ascii=False)}
