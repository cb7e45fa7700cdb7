"""The process that runs a model's program: it defines the functions, and calls them for the tests.

After `exec` the program controls this process: it may replace any of this code, or write to the channel itself. This
only lets it answer calls, which is its task; no verdict is ever read from this process.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

from .confinement import confine
from .wire import Channel, Closed, WireError, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAME = "candidate"
"""`__name__` of the program, so that a `__main__` block does not run."""


def main(settings: dict[str, Any]) -> None:
    """Confine this process, then serve until the other side ends."""
    channel = Channel(os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    confine(settings)
    try:
        channel.send("ready")
        program = _define(channel, channel.receive())
        while True:
            name, args, kwargs = channel.receive()
            channel.send(_call(program, name, args, kwargs))
    except Closed:
        pass
    finally:
        os._exit(0)


def _define(channel: Channel, code: str) -> dict[str, Any]:
    module = ModuleType(NAME)
    sys.modules[NAME] = module  # dataclasses look their module up
    try:
        exec(compile(code, f"<{NAME}>", "exec"), module.__dict__)
    except BaseException as error:
        channel.send(_raised(error))
    else:
        channel.send(["value", None])
    return module.__dict__


def _call(program: dict[str, Any], name: str, args: Any, kwargs: Any) -> list[Any]:
    try:
        if name not in program:
            raise NameError(f"name '{name}' is not defined")
        return ["value", encode(program[name](*decode(args), **decode(kwargs)))]
    except BaseException as error:
        return _raised(error)


def _raised(error: BaseException) -> list[Any]:
    """Names of its built-in classes, most specific first, and its message."""
    names = [each.__name__ for each in type(error).__mro__ if each.__module__ == "builtins"]
    if isinstance(error, WireError):
        names = ["ValueError"]
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    return ["raised", names, type(error).__name__, text]
