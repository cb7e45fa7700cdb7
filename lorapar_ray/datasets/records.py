"""Records of a local file, one at a time: JSONL, a JSON list or Parquet, JSON also gzipped. Memory holds one record."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lorapar_ray.errors import UserError
from lorapar_ray.files import expanded

CHUNK = 1 << 16
MAX_CHARACTERS = 1 << 26
"""Longest record, in characters: a longer line is rejected alone, also if it is compressed."""


LONGEST_WORD = len("-Infinity") + 1


class TooLong:
    """Placeholder for a line of more than MAX_CHARACTERS."""


def read_records(path: str, where: str) -> Iterator[dict[str, Any] | TooLong]:
    """Stream the records of a file.

    A file whose first character is `[` is a JSON list, under any name; any other is JSONL.

    Args:
        where: the config field the path came from, for error messages.

    Raises:
        UserError: no such file, not of these forms, or a record is not an object.
    """
    file = expanded(path, where)
    if file.is_dir():
        raise UserError(f"{where}: '{path}' is a folder; name a file in it (one source for each)")
    if not file.is_file():
        raise UserError(f"{where}: no such file '{path}'; paths are relative to the working directory")
    if file.suffix == ".parquet":
        yield from _parquet(file, where)
        return
    opener = gzip.open if file.suffix == ".gz" else open
    # only a newline ends a line: JSON may hold a bare carriage return; some editors put a byte order mark first
    with opener(file, "rt", encoding="utf-8-sig", newline="\n") as text:
        try:
            first = _first_character(text)
            for number, record in enumerate(_listed(text) if first == "[" else _lines(text), start=1):
                if not isinstance(record, dict | TooLong):
                    raise UserError(f"{where}: '{path}' row {number} is not a JSON object")
                yield record
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: '{path}' line {error.lineno} is not JSON ({error.msg})") from error
        except (RecursionError, ValueError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise UserError(f"{where}: '{path}' is neither JSON nor Parquet text ({error}); check it") from error
            raise UserError(f"{where}: '{path}' holds JSON that cannot be read ({str(error)[:80]})") from error
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{where}: '{path}' is neither JSON nor Parquet text ({error}); check the file") from error


def _parquet(file: Path, where: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lorapar_ray.datasets.short_floats import shortened, shorteners

    try:
        opened = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{where}: '{file}' is not a Parquet file ({error})") from error
    narrow = shorteners(opened.schema_arrow)
    for batch in opened.iter_batches(batch_size=1024):
        yield from (shortened(record, narrow) for record in batch.to_pylist())


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record; two values of one name are an error, since JSON would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _error_at(1, f"'{twice}' is given twice in one object")
    return found


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the error may be only that the text is cut here, in a string, a word or an escape."""
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - LONGEST_WORD


def _first_character(text: TextIO) -> str:
    while (chunk := text.read(CHUNK)).isspace():
        pass
    text.seek(0)
    return chunk.lstrip()[:1]


def _lines(text: TextIO) -> Iterator[Any]:
    for number, line in enumerate(_bounded_lines(text), start=1):
        if isinstance(line, TooLong):
            yield line
        elif line.strip():
            try:
                yield json.loads(line, object_pairs_hook=_once_each)
            except json.JSONDecodeError as error:
                error.lineno = number
                raise


def _bounded_lines(text: TextIO) -> Iterator[str | TooLong]:
    while line := text.readline(MAX_CHARACTERS):
        if len(line) < MAX_CHARACTERS or line.endswith("\n"):
            yield line
            continue
        while (rest := text.readline(CHUNK)) and not rest.endswith("\n"):
            pass
        yield TooLong()


def _listed(text: TextIO) -> Iterator[Any]:
    """The elements of a JSON list, decoded while they are read."""
    decoder = json.JSONDecoder(object_pairs_hook=_once_each)
    buffer, lines, started = "", 1, False
    while True:
        chunk = text.read(max(CHUNK, len(buffer)))  # doubled, so that a long element is not begun over and over
        buffer += chunk
        if len(buffer) > MAX_CHARACTERS:
            raise json.JSONDecodeError(f"an element of more than {MAX_CHARACTERS} characters", "", 0)
        while buffer:
            stripped = buffer.lstrip(" \t\r\n" if not started else " \t\r\n,")
            lines += buffer[: len(buffer) - len(stripped)].count("\n")
            buffer = stripped
            if not started:
                buffer, started = buffer[1:], True
                continue
            if buffer.startswith("]"):
                _require_only_space(buffer[1:], text, lines)
                return
            try:
                element, end = decoder.raw_decode(buffer)
                if end == len(buffer) and chunk:
                    break  # a number or word may go on in the next chunk
            except json.JSONDecodeError as error:
                if chunk and _may_go_on(error, buffer):
                    break
                error.lineno += lines - 1
                raise
            yield element
            lines += buffer[:end].count("\n")
            buffer = buffer[end:]
        if not chunk:
            raise _error_at(lines, "the list does not end")


def _require_only_space(begun: str, text: TextIO, line: int) -> None:
    """The list has ended in `line`: what follows would otherwise be dropped in silence.

    Args:
        begun: what was read after the list, before the rest of `text`.
    """
    while not (found := begun.lstrip()):
        line += begun.count("\n")
        if not (begun := text.read(CHUNK)):
            return
    line += begun[: len(begun) - len(found)].count("\n")
    raise _error_at(line, "there is text after the list's closing ']'; give one list, or one object per line")


def _error_at(line: int, message: str) -> json.JSONDecodeError:
    error = json.JSONDecodeError(message, "", 0)
    error.lineno = line
    return error
