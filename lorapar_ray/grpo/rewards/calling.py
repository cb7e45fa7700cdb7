"""How a reward function is called: by keyword with every column of the row, as TRL's GRPOTrainer (1.16) calls it.

The names are TRL's: `prompts`, `completions`, `completion_ids`, the data's own columns (all but the prompt's),
`trainer_state`, `log_extra` and `log_metric`. We add `answer` and `response` as text, if the data has no column of that
name. A chat's prompts and completions are lists of messages. A function may be async, may be a callable object, and may
return None for a sample that it does not apply to. A function whose first two parameters have other names gets prompts
and completions by position; one without `**kwargs` gets only the columns that it names.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from math import isfinite
from types import SimpleNamespace
from typing import Any

from lorapar_ray.waiting import awaited

NOT_FINITE = "not finite"
"""Replaces a value that is not a finite number; None is a sample that the reward does not apply to."""


class NotOneEach(ValueError):
    """A reward returned something else than a list with one number or None for each completion."""


def call(function: Callable[..., Any], request: dict[str, Any], own: bool) -> list[float | str | None]:
    """One value for each completion of a request {prompts, completions, columns}.

    Args:
        own: one of this project's rewards, which take the answers as text.

    Raises:
        NotOneEach: it returns something else than a list with one number or None for each completion.
        TypeError, ValueError: a value in the list is no number.
    """
    prompts, completions, columns = _arguments(request, own)
    result = _apply(function, prompts, completions, columns)
    if inspect.isawaitable(result):
        result = asyncio.run(awaited(result))
    return _values(result, len(completions))


def _arguments(request: dict[str, Any], own: bool) -> tuple[list[Any], list[Any], dict[str, Any]]:
    prompts, completions = list(request["prompts"]), list(request["completions"])
    columns = dict(request["columns"])
    chats, records, state = (columns.pop(name, None) for name in ("messages", "columns", "trainer_state"))
    if own:
        return prompts, completions, columns
    for index, chat in enumerate(chats or []):
        if chat:
            prompts[index] = chat
            completions[index] = [{"role": "assistant", "content": completions[index]}]
    rows = [json.loads(record) if record else {} for record in records or []]
    for name in rows[0] if rows else ():
        if name not in ("prompt", "prompts", "completion", "completions", "completion_ids"):
            columns[name] = [row.get(name) for row in rows]
    if state:
        columns["trainer_state"] = SimpleNamespace(**state[0])
    columns["log_extra"] = columns["log_metric"] = lambda name, value: None  # accepted, but not recorded
    return prompts, completions, columns


def _apply(function: Callable[..., Any], prompts: list[Any], completions: list[Any], columns: dict[str, Any]) -> Any:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of a C extension
        return function(prompts=prompts, completions=completions, **columns)
    names = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters)
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    taken = columns if anything else {name: value for name, value in columns.items() if name in names}
    if len(places) >= 2 and not {"prompts", "completions"} & names and places[0].default is inspect.Parameter.empty:
        first_two = {each.name for each in places[:2]}
        if not first_two & set(columns):
            return function(prompts, completions, **taken)
    given = {"prompts": prompts, "completions": completions}
    return function(**{name: value for name, value in given.items() if anything or name in names}, **taken)


def _values(result: Any, count: int) -> list[float | str | None]:
    if isinstance(result, str | bytes | dict) or not hasattr(result, "__iter__"):
        kind = "nothing" if result is None else f"a value of type {type(result).__name__}"
        raise NotOneEach(f"it returns {kind}; a reward returns a list with one number for each completion")
    try:
        listed: Sequence[Any] = list(result)
    except TypeError as error:  # an array without dimensions
        raise NotOneEach("it returns one number; a reward returns a list with one for each completion") from error
    if len(listed) != count:
        raise NotOneEach(f"it returns {len(listed)} values for {count} completions; a reward returns one for each")
    return [_value(each) for each in listed]


def _value(value: Any) -> float | str | None:
    if value is None:
        return None
    number = float(value)
    return number if isfinite(number) else NOT_FINITE
