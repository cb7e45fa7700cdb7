"""Readers: each turns one `data.train[i]` or `data.test[i]` of the config into a stream of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lorapar_ray.config import FileSource, HubSource, NamedSource, ReasoningGymSource, Source
from lorapar_ray.datasets.named import NAMED
from lorapar_ray.datasets.records import read_records
from lorapar_ray.datasets.rows import Row
from lorapar_ray.errors import UserError


def read_source(source: Source, where: str) -> Iterator[Row]:
    """Stream the rows of one source.

    Args:
        source: what to read.
        where: the config field it came from, such as `data.train[0]`, for error messages and row ids.

    Raises:
        UserError: a missing file, an empty source, a missing column, or a row without prompt or answer.
    """
    rows = islice(_rows(source, where), source.rows)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{where}: '{_describe(source)}' holds no rows; check the path, split or filter")
    yield first
    yield from rows


def _rows(source: Source, where: str) -> Iterator[Row]:
    if isinstance(source, ReasoningGymSource):
        return _reasoning_gym(source, where)
    if isinstance(source, NamedSource):
        return _named(source, where)
    if isinstance(source, HubSource):
        return _hub(source, where)
    return _file(source, where)


def _describe(source: Source) -> str:
    if isinstance(source, ReasoningGymSource):
        return source.task
    if isinstance(source, HubSource):
        return source.name
    return source.path or source.reader if isinstance(source, NamedSource) else source.path


def _reasoning_gym(source: ReasoningGymSource, where: str) -> Iterator[Row]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"{where}: reader reasoning_gym needs its package; pip install reasoning-gym") from error
    try:
        questions = reasoning_gym.create_dataset(source.task, size=source.rows, seed=source.seed, **source.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{where}: reasoning_gym refuses task '{source.task}' with its options: {error}") from error
    for index, item in enumerate(questions):
        metadata = item["metadata"]
        knobs = metadata.get("difficulty", {})  # most tasks name their settings here, a few give one number
        measured = {k: metadata[k] for k in knobs if k in metadata} if isinstance(knobs, dict) else {"level": knobs}
        yield Row(
            id=f"{source.task}-{source.seed}-{index}",
            prompt=str(item["question"]),
            response=str(item["answer"]),
            answer=str(item["answer"]),
            task=source.task,
            difficulty=", ".join(f"{key} {value}" for key, value in measured.items()),
        )


def _file(source: FileSource, where: str) -> Iterator[Row]:
    return _mapped(read_records(source.path, where), source.fields, where, source.path, Path(source.path).stem)


def _hub(source: HubSource, where: str) -> Iterator[Row]:
    records = _hub_records(source.name, source.config, source.split, where)
    return _mapped(records, source.fields, where, source.name, source.name.rsplit("/", 1)[-1])


def _mapped(
    records: Iterator[dict[str, Any]], fields: Mapping[Any, str], where: str, origin: str, task: str
) -> Iterator[Row]:
    """Rows of records whose columns `fields` names; a column that is not mapped goes by our own name."""
    column = {name: fields.get(name, name) for name in ("id", "prompt", "context", "response", "answer")}
    for index, record in enumerate(records):
        answer = _text(record.get(column["answer"]))
        response = _text(record.get(column["response"])) or answer
        prompt = _text(record.get(column["prompt"]))
        if not prompt:
            raise UserError(_lacks(where, origin, index, "prompt", column["prompt"]))
        if not (answer or response):
            raise UserError(_lacks(where, origin, index, "answer", column["answer"]))
        context = _text(record.get(column["context"]))
        yield Row(
            id=_text(record.get(column["id"])) or f"{task}-{index}",
            prompt=f"{context}\n\n{prompt}" if context else prompt,
            response=response,
            answer=answer or response,
            task=task,
        )


def _named(source: NamedSource, where: str) -> Iterator[Row]:
    spec = NAMED[source.reader]
    if source.path is not None:
        records = read_records(source.path, where)
        origin, part = source.path, Path(source.path).name.partition(".")[0]
    else:
        records = _hub_records(spec.hub_name, spec.hub_config, source.split, where)
        origin, part = spec.hub_name, source.split
    for index, record in enumerate(records):
        try:
            prompt, response, answer = spec.convert(record)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: '{origin}' row {index} is not in the format of {source.reader} ({error!r}); "
                "use reader: file with a field mapping"
            ) from error
        yield Row(f"{source.reader}-{part}-{index}", prompt, response, answer, source.reader)


def _hub_records(name: str, config: str | None, split: str, where: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        stream = load_dataset(name, config, split=split, streaming=True)
        yield from stream
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: cannot read '{name}' split '{split}' from the hub ({type(error).__name__}); "
            "check the network or give a local file as path"
        ) from error


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _lacks(where: str, path: str, index: int, what: str, column: str) -> str:
    return f"{where}: '{path}' row {index} has no {what}; fill its '{column}' or map another column with fields"
