"""The labelled rows and the test rows of a run as tokens, and the selection that a stage keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import parquet_batches, read_object
from lorapar_ray.config import Config
from lorapar_ray.datasets.chat import load_encoder_alone
from lorapar_ray.datasets.rows import COLUMNS
from lorapar_ray.datasets.tables import reject, reject_table
from lorapar_ray.datasets.tokens import ROWS_PER_BATCH, Selection, TokenTable, key_of, write_tokens
from lorapar_ray.errors import UserError
from lorapar_ray.files import digest, write_json
from lorapar_ray.fingerprints import Fingerprints
from lorapar_ray.models import model_reference, resolve_model
from lorapar_ray.progress import console
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import model_files
from lorapar_ray.text import markup
from lorapar_ray.workers import on_a_worker


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
        of_prompt: it limits only the prompt, to one token less than a selection's `max_length`.

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
        console.print(
            f"  [yellow]{rejects.count} prompts are too long and are skipped[/]: {markup(target)}", markup=True
        )


def token_table(config: Config, run: RunDirectory) -> Path:
    """The run's labelled rows as tokens (see `datasets.tokens`), written by a task on a worker if they are not there.

    Raises:
        UserError: the tokenizer cannot be loaded, or the labels are damaged.
    """
    return _tokens(config, run, "tokens.arrow", sorted(run.labels.glob("*.parquet")), COLUMNS | {"system": int})


def evaluation_table(config: Config, run: RunDirectory) -> Path:
    """The run's test rows in the same form.

    Raises:
        UserError: the tokenizer cannot be loaded, or the rows are missing or damaged.
    """
    return _tokens(config, run, "test.arrow", [run.data / "test.parquet"], COLUMNS)


def _tokens(config: Config, run: RunDirectory, name: str, files: list[Path], columns: dict[str, type]) -> Path:
    """The tokenizer is loaded where the task runs, so a hub name or a package is looked up there and not here.

    `<name>.json` holds the digest of what was written: a damaged file is written again.
    """
    target, prints = run.work / name, run.fingerprints
    rows = [[file.name, prints.of_file(file)] for file in files if file.is_file()]
    models = {path: prints.of_input(path) for path in model_files(config.model.path)}
    key = digest([config.model.path, config.model.system_prompt, models, rows])
    if key_of(target) != key or not _is_as_written(target, prints):
        on_a_worker(
            _tokenise,
            config.model.model_dump(mode="json"),
            model_reference(config.model.path),
            [str(file) for file in files],
            columns,
            str(target),
            key,
            run=run,
            writes=[target],
            environment={"LORAPAR_TASK": "tokenise"},  # a process of its own: transformers has no torch in it
        )
        write_json(_written(target), {"sha256": prints.of_file(target)})
    return target


def _is_as_written(target: Path, prints: Fingerprints) -> bool:
    try:
        return bool(read_object(_written(target))["sha256"] == prints.of_file(target))
    except (UserError, KeyError):
        return False


def _written(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _tokenise(
    model: dict[str, Any], path: str, files: list[str], columns: dict[str, type], target: str, key: str
) -> None:
    encoder = load_encoder_alone(resolve_model(path), model["system_prompt"], model["trust_remote_code"])
    batches = (rows for file in files for rows in parquet_batches(Path(file), columns, ROWS_PER_BATCH))
    write_tokens(batches, encoder, Path(target), key, labelled="system" in columns)
