"""The labelled rows of a run, and their form as tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lorapar_ray.datasets.chat import Encoder, Prompt
from lorapar_ray.datasets.rows import COLUMNS, read_table
from lorapar_ray.datasets.tables import reject_table
from lorapar_ray.errors import UserError
from lorapar_ray.progress import console
from lorapar_ray.runs import RunDirectory
from lorapar_ray.text import markup


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


def prompt_of(row: dict[str, Any]) -> Prompt:
    """What the model is asked: the row's messages if it is a chat, else its prompt."""
    messages: Prompt = json.loads(row["messages"]) if row.get("messages") else row["prompt"]
    return messages


def encode_rows(
    encoder: Encoder,
    run: RunDirectory,
    rows: Iterable[dict[str, Any]],
    *,
    stage: str,
    max_length: int,
    field: str,
) -> list[dict[str, Any]]:
    """Rows as {id, input_ids, response_start}; those whose prompt leaves no room for an answer are rejected.

    Raises:
        UserError: every prompt is too long.
    """
    encoded: list[dict[str, Any]] = []
    long: list[dict[str, Any]] = []
    for row in rows:
        try:
            ids, start = encoder.example(prompt_of(row), row["response"], max_length)
        except ValueError:
            long.append(row)
        else:
            encoded.append({"id": row["id"], "input_ids": ids, "response_start": start})
    _reject(run, stage, long, f"the prompt leaves no room for an answer within {field} {max_length}")
    if not encoded:
        raise UserError(f"{field}: no prompt leaves room for an answer within {max_length} tokens; raise it")
    return encoded


def fitting_prompts(
    encoder: Encoder, run: RunDirectory, rows: Sequence[dict[str, Any]], *, stage: str, limit: int, field: str
) -> list[dict[str, Any]]:
    """Rows with their `prompt_ids`; those of more than `limit` tokens go to `rejects/<stage>.parquet`.

    Raises:
        UserError: every prompt is too long.
    """
    prompts = [row | {"prompt_ids": encoder.prompt_ids(prompt_of(row))} for row in rows]
    fitting = [row for row in prompts if len(row["prompt_ids"]) <= limit]
    long = [row for row, asked in zip(rows, prompts, strict=True) if len(asked["prompt_ids"]) > limit]
    _reject(run, stage, long, f"prompt longer than {field} allows ({limit} tokens)")
    if not fitting:
        raise UserError(f"{field}: every prompt is longer than {limit} tokens; raise it")
    return fitting


def _reject(run: RunDirectory, stage: str, rows: Sequence[dict[str, Any]], reason: str) -> None:
    target = run.rejects / f"{stage}.parquet"
    with reject_table(target) as rejects:
        for row in rows:
            text = json.dumps(row, ensure_ascii=False)
            rejects.add({"id": row["id"], "stage": stage, "reason": reason, "row": text})
    if rows:
        console.print(f"  [yellow]{len(rows)} prompts are too long and left out[/]: {markup(target)}", markup=True)
