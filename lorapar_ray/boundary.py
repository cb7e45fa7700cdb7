"""The boundary to foreign files and libraries: turns their errors into one line that names the cause.

Catching only the documented errors of a library is not enough: a truncated file raises `EOFError`, deep JSON
`RecursionError`, a number of 5,000 digits `ValueError`, and Rust code panics. So all code that reads input of a user, a
run directory, the hub or an engine runs within `boundary`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.text import reason

REDO = "run the stage that writes it again, or restore it"


@contextmanager
def boundary(what: str, fix: str = "") -> Iterator[None]:
    """Turn what the block raises into a `UserError`: "<what> (<reason>); <fix>".

    Args:
        what: what failed, with its field or file: "model.path 'x': cannot be loaded".
        fix: what the user can do.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Rust code (safetensors, tokenizers): no `Exception`
        if not isinstance(error, Exception) and not panic:
            raise
        raise UserError(f"{what} ({reason(error)})" + (f"; {fix}" if fix else "")) from error


def imported(name: str, what: str, fix: str = "is it on PYTHONPATH?") -> Any:
    """The function or class that `module:name` names.

    Args:
        what: the field that names it, with its value.

    Raises:
        UserError: it does not exist, cannot be called, or its module fails or exits during import.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} cannot be imported ({reason(error)}); {fix}") from error
    if not callable(found):
        raise UserError(f"{what} is no function and no class but a {type(found).__name__}; {fix}")
    return found


def damaged(path: Path, fix: str = REDO) -> Any:
    """The boundary around reading `path`."""
    return boundary(f"'{path}' is damaged or has another format", fix)


def read_json(path: Path, fix: str = REDO) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: it is missing, unreadable, not UTF-8, or not JSON.
    """
    if not path.is_file():
        raise UserError(f"'{path}' is missing; {fix}")
    with damaged(path, fix):
        return json.loads(path.read_text(encoding="utf-8"))


def read_object(path: Path, fix: str = REDO) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: as `read_json`, or it is not an object.
    """
    found = read_json(path, fix)
    if not isinstance(found, dict):
        raise UserError(f"'{path}' holds no JSON object; {fix}")
    return found


def read_lines(path: Path, fix: str = REDO) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line, also after a killed run; empty if there is no file.

    Only a newline ends a line: `str.splitlines` also splits at characters that models write, such as U+2028. Text after
        the last newline is an incomplete line of a killed run and is ignored.

    Raises:
        UserError: a complete line is not a JSON object.
    """
    if not path.is_file():
        return []
    with damaged(path, fix):
        whole = path.read_bytes().split(b"\n")[:-1]
        lines = [json.loads(line) for line in whole if line.strip()]
        for number, line in enumerate(lines, start=1):
            if not isinstance(line, dict):
                raise ValueError(f"line {number} is no JSON object")
        return lines


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of such a file while it is being written, for a progress bar; empty if there is none."""
    try:
        found = json.loads(path.read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2])
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_tensors(path: Path, fix: str = REDO) -> dict[str, Any]:
    """Every tensor of a safetensors file, on the CPU.

    Raises:
        UserError: it is missing, or not safetensors.
    """
    return read_tensors_and_metadata(path, fix)[0]


def read_tensors_and_metadata(path: Path, fix: str = REDO) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Every tensor of a safetensors file and its header's metadata.

    Raises:
        UserError: it is missing, or not safetensors.
    """
    file = open_tensors(path, fix)
    with damaged(path, fix):
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def open_tensors(path: Path, fix: str = REDO) -> Any:
    """An open `safe_open` handle; tensors are read on demand.

    Raises:
        UserError: the file is missing, truncated, or not safetensors.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise UserError(f"'{path}' is missing; {fix}")
    with damaged(path, fix):
        return safe_open(path, framework="pt")


def parquet_batches(
    path: Path, columns: Mapping[str, type], rows: int, fix: str = REDO, *, only_these: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one of our Parquet files, in chunks.

    Args:
        columns: required columns, with the Python type of their values.
        only_these: do not read the others, such as long texts.

    Raises:
        UserError: the file is missing or damaged, or lacks a column, or a value is of another type.
    """
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"'{path}' is missing; {fix}")
    with damaged(path, fix):
        file = pq.ParquetFile(path)
    batches = file.iter_batches(rows, columns=list(columns) if only_these else None)
    while True:
        with damaged(path, fix):
            found = [row for batch in islice(batches, 1) for row in batch.to_pylist()]
            for row in found:
                for name, kind in columns.items():
                    if not isinstance(row[name], kind):
                        raise TypeError(f"column '{name}' holds {type(row[name]).__name__}")
        if not found:
            return
        yield found
