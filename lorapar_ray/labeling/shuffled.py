"""A control for votes: the same labels, shuffled among the questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.files import atomic_path

COLUMN = "system"
DRAW = 0x5AFF1E
"""Makes this draw independent of others with the same seed."""


def shuffle_labels(file: Path, seed: int) -> None:
    """Permute the column of labels of a labels file: each System keeps its number of labels.

    The other columns, also the votes, do not change. Holds one label a question in memory.
    """
    labels = pq.read_table(file, columns=[COLUMN])[COLUMN].to_numpy()
    drawn = np.random.default_rng([seed, DRAW]).permutation(labels)
    table, first = pq.ParquetFile(file), 0
    place = table.schema_arrow.get_field_index(COLUMN)
    with atomic_path(file) as draft, pq.ParquetWriter(draft, table.schema_arrow) as writer:
        for batch in table.iter_batches():
            own = pa.array(drawn[first : first + len(batch)], type=table.schema_arrow.field(place).type)
            writer.write_batch(batch.set_column(place, table.schema_arrow.field(place), own))
            first += len(batch)
