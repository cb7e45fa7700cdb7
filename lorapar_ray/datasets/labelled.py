"""The labelled rows and the test rows of a run as tokens, and which of them a stage keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import parquet_batches
from lorapar_ray.config import Config
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.datasets.rows import COLUMNS
from lorapar_ray.datasets.tables import reject, reject_table
from lorapar_ray.datasets.tokens import ROWS_PER_BATCH, Selection, TokenTable, key_of, write_tokens
from lorapar_ray.errors import UserError
from lorapar_ray.models import model_reference, resolve_model
from lorapar_ray.progress import console
from lorapar_ray.runs import RunDirectory, digest
from lorapar_ray.tasks import on_a_worker
from lorapar_ray.text import markup


def require_room(
    run: RunDirectory,
    table: TokenTable,
    chosen: Sequence[Selection],
    *,
    stage: str,
    field: str,
    of_prompt: bool = False,
) -> list[int]:
    """How many rows each selection keeps; those whose prompt leaves no room for an answer are rejected.

    Args:
        field: the setting that limits the length.
        of_prompt: it limits the prompt alone, to one token less than a selection's `max_length`.

    Raises:
        UserError: every prompt of a selection is too long.
    """
    kept: list[int] = []
    long: set[int] = set()
    for selection in chosen:
        fitting, left_out = selection.split(table)
        limit = selection.max_length - of_prompt
        if not len(fitting):
            if of_prompt:
                raise UserError(f"{field}: every prompt is longer than {limit} tokens; raise it")
            raise UserError(f"{field}: no prompt leaves room for an answer within {limit} tokens; raise it")
        kept.append(len(fitting))
        long.update(left_out.tolist())
    reason = f"prompt longer than {field} allows ({limit} tokens)"
    if not of_prompt:
        reason = f"the prompt leaves no room for an answer within {field} {limit}"
    _reject(run, stage, (table.question(row) for row in sorted(long)), reason)
    return kept


def _reject(run: RunDirectory, stage: str, rows: Iterable[dict[str, Any]], reason: str) -> None:
    """List rows whose prompts are too long in `rejects/<stage>.parquet`; without any, remove that file."""
    target = run.rejects / f"{stage}.parquet"
    with reject_table(target) as rejects:
        for row in rows:
            rejects.add(reject(row, stage, reason))
    if rejects.count:
        console.print(f"  [yellow]{rejects.count} prompts are too long and left out[/]: {markup(target)}", markup=True)


def token_table(config: Config, run: RunDirectory) -> Path:
    """The run's labelled rows as tokens (see `datasets.tokens`), written by a task on a worker if they are not there.

    Raises:
        UserError: the tokenizer cannot be loaded, or the labels are damaged.
    """
    return _tokens(config, run.work / "tokens.arrow", sorted(run.labels.glob("*.parquet")), COLUMNS | {"system": int})


def evaluation_table(config: Config, run: RunDirectory) -> Path:
    """The run's test rows in the same form.

    Raises:
        UserError: the tokenizer cannot be loaded, or the rows are missing or damaged.
    """
    return _tokens(config, run.work / "test.arrow", [run.data / "test.parquet"], COLUMNS)


def _tokens(config: Config, target: Path, files: list[Path], columns: dict[str, type]) -> Path:
    """The tokenizer is loaded where the task runs, so a hub name or a package is looked up there and not here."""
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    key = digest([config.model.path, config.model.system_prompt, stamps])
    if key_of(target) != key:
        on_a_worker(
            _tokenise,
            config.model.model_dump(mode="json"),
            model_reference(config.model.path),
            [str(file.resolve()) for file in files],
            columns,
            str(target.resolve()),
            key,
        )
    return target


def _tokenise(
    model: dict[str, Any], path: str, files: list[str], columns: dict[str, type], target: str, key: str
) -> None:
    encoder = load_encoder(resolve_model(path), model["system_prompt"], model["trust_remote_code"])
    batches = (rows for file in files for rows in parquet_batches(Path(file), columns, ROWS_PER_BATCH))
    write_tokens(batches, encoder, Path(target), key)
