"""Readers: each turns one `data.train[i]` or `data.test[i]` of the config into a stream of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import boundary
from lorapar_ray.config import FileSource, HubSource, NamedSource, ReasoningGymSource, Source
from lorapar_ray.datasets.named import NAMED
from lorapar_ray.datasets.records import MAX_CHARACTERS, TooLong, read_records
from lorapar_ray.datasets.rows import Lost, MadeUpId, Row
from lorapar_ray.datasets.values import UnfitError, columns_json, messages_of, readable, text_of
from lorapar_ray.errors import UserError

TOO_LONG = f"longer than {MAX_CHARACTERS} characters"


def read_source(source: Source, where: str) -> Iterator[Row | Lost]:
    """Stream the rows of one source.

    Args:
        source: what to read.
        where: the config field it came from, such as `data.train[0]`, for error messages and row ids.

    Raises:
        UserError: a missing file, an empty source, a missing column, or a row without prompt or answer.
    """
    with boundary(f"{where}: '{_describe(source)}' cannot be read", "check the file, or the names in fields"):
        rows = islice(_rows(source, where), source.rows)
        first = next(rows, None)
        if first is None:
            raise UserError(f"{where}: '{_describe(source)}' holds no rows; check the path, split or filter")
        yield first
        yield from rows


def _rows(source: Source, where: str) -> Iterator[Row | Lost]:
    if isinstance(source, ReasoningGymSource):
        return _reasoning_gym(source, where)
    if isinstance(source, NamedSource):
        return _named(source, where)
    if isinstance(source, HubSource):
        return _hub(source, where)
    return _file(source, where)


def task_of(source: Source) -> str:
    """The task of all rows of a source, as `Row.task` has it."""
    if isinstance(source, ReasoningGymSource):
        return source.task
    if isinstance(source, NamedSource):
        return source.reader
    return source.name.rsplit("/", 1)[-1] if isinstance(source, HubSource) else Path(source.path).stem


def _describe(source: Source) -> str:
    if isinstance(source, ReasoningGymSource):
        return source.task
    if isinstance(source, HubSource):
        return source.name
    return source.path or source.reader if isinstance(source, NamedSource) else source.path


def _reasoning_gym(source: ReasoningGymSource, where: str) -> Iterator[Row | Lost]:
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
            id=MadeUpId(f"{source.task}-{source.seed}-{index}"),
            prompt=str(item["question"]),
            response=str(item["answer"]),
            answer=str(item["answer"]),
            task=task_of(source),
            difficulty=", ".join(f"{key} {value}" for key, value in measured.items()),
            columns=columns_json(item, without="prompt"),
        )


def _file(source: FileSource, where: str) -> Iterator[Row | Lost]:
    return _mapped(read_records(source.path, where), source.fields, where, source.path, task_of(source))


def _hub(source: HubSource, where: str) -> Iterator[Row | Lost]:
    records = _hub_records(source.name, source.config, source.split, where)
    return _mapped(records, source.fields, where, source.name, task_of(source))


def _mapped(
    records: Iterator[dict[str, Any] | TooLong], fields: Mapping[Any, str], where: str, origin: str, task: str
) -> Iterator[Row | Lost]:
    """Rows of records whose columns `fields` names; a column that is not mapped goes by our own name."""
    column = {name: fields.get(name, name) for name in ("id", "prompt", "context", "response", "answer")}
    for index, record in enumerate(records):
        made_up, row = MadeUpId(f"{task}-{index}"), f"{where}: '{origin}' row {index}"
        if isinstance(record, TooLong):
            yield Lost(made_up, TOO_LONG, "")
            continue
        asked = record.get(column["prompt"])
        try:
            messages = messages_of(asked, row, column["prompt"]) if isinstance(asked, list) else []
            text = {name: text_of(record.get(own), row, own) for name, own in column.items() if name != "prompt"}
            prompt = readable(messages) if messages else text_of(asked, row, column["prompt"])
        except UnfitError as error:
            yield Lost(made_up, str(error), json.dumps(record, default=str))
            continue
        answer, context = text["answer"], text["context"]
        response = text["response"] or answer
        if not prompt:
            raise UserError(_lacks(where, origin, index, "prompt", column["prompt"]))
        if not (answer or response):
            raise UserError(_lacks(where, origin, index, "answer", column["answer"]))
        if context and messages:
            raise UserError(f"{row}: it has messages and a '{column['context']}'; put that into a message")
        yield Row(
            id=text["id"] or made_up,
            prompt=f"{context}\n\n{prompt}" if context else prompt,
            response=response,
            answer=answer or response,
            task=task,
            messages=messages,
            columns=columns_json(record, without=column["prompt"]),
        )


def _named(source: NamedSource, where: str) -> Iterator[Row | Lost]:
    spec = NAMED[source.reader]
    records: Iterator[dict[str, Any] | TooLong]
    if source.path is not None:
        records = read_records(source.path, where)
        origin, part = source.path, Path(source.path).name.partition(".")[0]
    else:
        records = _hub_records(spec.hub_name, spec.hub_config, source.split, where)
        origin, part = spec.hub_name, source.split
    for index, record in enumerate(records):
        made_up, row = MadeUpId(f"{source.reader}-{part}-{index}"), f"{where}: '{origin}' row {index}"
        if isinstance(record, TooLong):
            yield Lost(made_up, TOO_LONG, "")
            continue
        try:
            found = zip(("prompt", "response", "answer"), spec.convert(record), strict=True)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{row} is not in the format of {source.reader} ({error!r}); use reader: file with a field mapping"
            ) from error
        try:
            prompt, response, answer = (text_of(value, row, name) for name, value in found)
        except UnfitError as error:
            yield Lost(made_up, str(error), json.dumps(record, default=str))
            continue
        if not prompt:
            yield Lost(made_up, "no question in the published data", json.dumps(record, default=str))
            continue
        yield Row(made_up, prompt, response, answer, task_of(source), columns=columns_json(record, without="prompt"))


def _hub_records(name: str, config: str | None, split: str, where: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    from lorapar_ray.datasets.short_floats import shortened, shorteners

    try:
        stream = load_dataset(name, config, split=split, streaming=True)
        narrow = {} if stream.features is None else shorteners(stream.features.arrow_schema)
        yield from (shortened(record, narrow) for record in stream)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: cannot read '{name}' split '{split}' from the hub ({type(error).__name__}); "
            "check the network or give a local file as path"
        ) from error


def _lacks(where: str, path: str, index: int, what: str, column: str) -> str:
    return f"{where}: '{path}' row {index} has no {what}; fill its '{column}' or map another column with fields"
