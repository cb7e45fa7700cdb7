"""Floats of 16 and 32 bits as their shortest decimal: Python has floats of 64 bits, in which 0.1 of 32 bits reads
0.10000000149011612, an answer that no model gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

Shorten = Callable[[Any], Any]


def shorteners(schema: pa.Schema) -> dict[str, Shorten]:
    """For each column with such floats, also within its lists and objects: what shortens a value of it."""
    found = {field.name: _of(field.type) for field in schema}
    return {name: shorten for name, shorten in found.items() if shorten is not None}


def shortened(record: dict[str, Any], columns: Mapping[str, Shorten]) -> dict[str, Any]:
    """A record with its floats as their shortest decimal."""
    return {name: columns[name](value) if name in columns else value for name, value in record.items()}


def _of(kind: pa.DataType) -> Shorten | None:
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        narrow = np.float16 if pa.types.is_float16(kind) else np.float32
        return lambda value: None if value is None else float(str(narrow(value)))
    if pa.types.is_struct(kind):
        parts = shorteners(pa.schema(list(kind)))
        return (lambda value: None if value is None else shortened(value, parts)) if parts else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _of(kind.value_type)
        return None if inner is None else lambda value: None if value is None else [inner(each) for each in value]
    return None
