"""The labelled rows of a run, and their form as tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import parquet_batches
from lorapar_ray.config import Config
from lorapar_ray.datasets.chat import Encoder, Prompt, load_encoder
from lorapar_ray.datasets.rows import COLUMNS, read_table
from lorapar_ray.datasets.tables import reject_table
from lorapar_ray.datasets.tokens import ROWS_PER_BATCH, Selection, TokenTable, key_of, write_tokens
from lorapar_ray.errors import UserError
from lorapar_ray.models import model_reference, resolve_model
from lorapar_ray.progress import console
from lorapar_ray.runs import RunDirectory, digest
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


def require_room(
    run: RunDirectory, table: TokenTable, chosen: Sequence[Selection], *, stage: str, field: str
) -> list[int]:
    """How many rows each selection keeps; those whose prompt leaves no room for an answer are rejected.

    Raises:
        UserError: every prompt of a selection is too long.
    """
    kept, long = [], set()
    for selection in chosen:
        fitting, left_out = selection.split(table)
        if not fitting:
            limit = selection.max_length
            raise UserError(f"{field}: no prompt leaves room for an answer within {limit} tokens; raise it")
        kept.append(len(fitting))
        long |= set(left_out)
    limit = chosen[0].max_length
    rows = (row for number, row in enumerate(_rows(run)) if number in long) if long else iter(())
    _reject(run, stage, list(rows), f"the prompt leaves no room for an answer within {field} {limit}")
    return kept


def _rows(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """The labelled rows one by one, as the token file numbers them."""
    for batch in labelled_batches(run.labels):
        yield from batch


def labelled_batches(labels: Path) -> Iterator[list[dict[str, Any]]]:
    """The labelled rows, some at a time, in file and row order."""
    for file in sorted(labels.glob("*.parquet")):
        yield from parquet_batches(file, COLUMNS | {"system": int}, ROWS_PER_BATCH)


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


def token_table(config: Config, run: RunDirectory) -> Path:
    """The run's labelled rows as tokens (see `datasets.tokens`), written by a task on a worker if they are not there.

    The tokenizer is loaded where the task runs, so a hub name or a package is looked up there and not here.

    Raises:
        UserError: the tokenizer cannot be loaded, or the labels are damaged.
    """
    import ray

    target = run.work / "tokens.arrow"
    stamps = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(run.labels.glob("*.parquet"))
    ]
    key = digest([config.model.path, config.model.system_prompt, stamps])
    if key_of(target) != key:
        model = config.model.model_dump(mode="json")
        work = ray.remote(_tokenise).options(num_cpus=0, runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": ""}})
        problem = ray.get(
            work.remote(
                model, model_reference(config.model.path), str(run.labels.resolve()), str(target.resolve()), key
            )
        )
        if problem is not None:
            raise UserError(problem)
    return target


def _tokenise(model: dict[str, Any], path: str, labels: str, target: str, key: str) -> str | None:
    """Write the token file (a Ray task); returns the message of a user's error."""
    try:
        encoder = load_encoder(resolve_model(path), model["system_prompt"], model["trust_remote_code"])
        rows = labelled_batches(Path(labels))
        write_tokens(rows, prompt_of, encoder, Path(target), key)
    except UserError as error:
        return str(error)
    return None
