"""Values allowed in a text column of user data, and their conversion to text (never a Python `repr`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from math import isfinite
from typing import Any

from lorapar_ray.errors import UserError

_KINDS = {bool: "a boolean", list: "a list", dict: "an object", bytes: "bytes", float: "not a finite number"}


class UnfitError(ValueError):
    """A row that is left out and listed, with the reason."""


def text_of(value: Any, row: str, column: str) -> str:
    """A text or a number as it is written, without an exponent; "" for null.

    Args:
        row: names the row in messages.

    Raises:
        UserError: it is anything else.
        UnfitError: it holds half of a surrogate pair, which no file can hold.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UnfitError(f"its '{column}' holds half of a surrogate pair, which is not a character") from error
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | Decimal) and isfinite(value):
        return format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    kind = _KINDS.get(type(value), f"of type {type(value).__name__}")
    raise UserError(f"{row}: its '{column}' is {kind}; give text or a number")


def messages_of(value: Any, row: str, column: str) -> list[dict[str, str]]:
    """A chat up to where the answer begins: a list of {role, content}, both text.

    Raises:
        UserError: it is something else, or it ends with the assistant's answer.
        UnfitError: see `text_of`.
    """
    chat = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    if not chat or not all(isinstance(each.get(key), str) for each in value for key in ("role", "content")):
        raise UserError(f"{row}: its '{column}' is a list; give text, or messages with 'role' and 'content' as text")
    if value[-1]["role"] == "assistant":
        raise UserError(f"{row}: its '{column}' ends with the assistant's message; move it to the answer")
    for message in value:
        text_of(message["content"], row, column)
        text_of(message["role"], row, column)
    return [{"role": message["role"], "content": message["content"]} for message in value]


def readable(messages: list[dict[str, str]]) -> str:
    """A chat as text, for teachers and reports: one user's turn as it is, several with their roles."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"].strip()
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content'].strip()}" for message in messages)


def columns_json(record: Mapping[str, Any], without: str) -> str:
    """A record's columns as JSON, for rewards; what JSON cannot hold (images, dates) is left out."""
    kept = {}
    for name, value in record.items():
        try:
            kept[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError, RecursionError):
            continue
    kept.pop(without, None)
    return json.dumps(kept)
