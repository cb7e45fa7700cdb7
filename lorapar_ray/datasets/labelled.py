"""The labelled rows of a run, and their form as tokens."""

from __future__ import annotations

from typing import Any

from lorapar_ray.datasets.chat import Encoder
from lorapar_ray.datasets.rows import COLUMNS, read_table
from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory


def labelled_rows(run: RunDirectory, systems: list[int], field: str) -> list[dict[str, Any]]:
    """The labelled rows of some Systems, in the order they were labelled.

    Raises:
        UserError: there is none.
    """
    rows = [row for row in read_table(run.labels, COLUMNS | {"system": int}) if row["system"] in systems]
    if not rows:
        raise UserError(
            f"{field}: no row of '{run.labels}' is labelled System {' or '.join(map(str, systems))}; "
            "look at the vote in the report, and at label.examples and label.calibration"
        )
    return rows


def encode_rows(encoder: Encoder, rows: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Rows as {id, input_ids, response_start}."""
    encoded = []
    for row in rows:
        ids, start = encoder.example(row["prompt"], row["response"], max_length)
        encoded.append({"id": row["id"], "input_ids": ids, "response_start": start})
    return encoded
