"""The process that runs the tests and decides the verdict: warm, and forked for each job.

The tests call the program under test through a channel to its process. Tested names are bound to stand-ins, which send
the arguments and rebuild the result from plain data (see `wire`).
"""

from __future__ import annotations

import builtins
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any

from .confinement import confine, forbid_processes, limit
from .wire import Channel, WireError, decode, encode

PRELOADED = ("collections", "copy", "functools", "heapq", "itertools", "math", "random", "re", "string", "typing")
"""Modules that tests import often."""
LOOP_ENDS = (StopIteration, StopAsyncIteration)


class Broken(BaseException):
    """The program's process has ended or sends invalid data; an `except Exception` of the tests cannot hide it."""


class CandidateError(Exception):
    """The program raised an exception that is not built in."""


def main(settings: dict[str, Any]) -> None:
    """Read jobs from standard input until it ends: a file descriptor of the program's channel, then {job}."""
    for name in PRELOADED:
        __import__(name)
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    channel = Channel(control.fileno())
    confine(settings)
    channel.send({"ready": True})
    while True:
        _, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not fds:
            return
        job = channel.receive()
        child = os.fork()
        if child == 0:
            try:
                if settings["seccomp"] is not None:
                    forbid_processes()
                limit(resource.RLIMIT_CPU, int(job["seconds"]) + 2)
                channel.send(examine(Channel(fds[0]), job, lambda: channel.send({"started": True})))
            finally:
                os._exit(0)
        os.close(fds[0])
        _, status = os.waitpid(child, 0)
        channel.send({"end": status})


def examine(candidate: Channel, job: dict[str, Any], started: Callable[[], None]) -> dict[str, Any]:
    """Run the tests of {code, setup, tests, names}; they pass if they run to their end.

    Returns:
        {reason, detail}, with `reason` one of `passed`, `failed`, `raised`, `died`, `tests`, or `unready` if the
        program's process never reported that it is ready.
    """
    line = Line(candidate)
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        line.receive()
    except Broken as error:
        return {"reason": "unready", "detail": str(error)}
    try:
        started()
        line.send(job["code"])
        line.answer()
    except Broken as error:
        return {"reason": "died", "detail": str(error)}
    except BaseException as error:
        return {"reason": "raised", "detail": _describe(error)}
    try:
        exec(compile(job["setup"], "<setup>", "exec"), namespace)
        tests = compile(job["tests"], "<tests>", "exec")
    except BaseException as error:
        return {"reason": "tests", "detail": f"the tests themselves fail: {_describe(error)}"}
    namespace.update({name: line.function(name) for name in job["names"]})
    try:
        exec(tests, namespace)
    except BaseException as error:
        if not line.broken:
            where = _line_of(error, job["tests"])
            reason = "failed" if type(error) is AssertionError else "raised"
            return {"reason": reason, "detail": f"{_describe(error)}{where}"}
    if line.broken:
        return {"reason": "died", "detail": line.broken}
    return {"reason": "passed", "detail": ""}


class Line:
    """The channel to the program, and whether it has failed."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.broken = ""

    def send(self, message: Any) -> None:
        """As `Channel.send`; Broken if it fails."""
        self._guard(lambda: self._channel.send(message))

    def receive(self) -> Any:
        """As `Channel.receive`; Broken if it fails."""
        return self._guard(self._channel.receive)

    def answer(self) -> Any:
        """The value of the program's answer; raises the built-in exception that the program raised."""
        message = self.receive()
        if isinstance(message, list) and len(message) == 2 and message[0] == "value":
            return self._guard(lambda: decode(message[1]))
        if isinstance(message, list) and len(message) == 4 and message[0] == "raised":
            raise _exception(*message[1:])
        return self._guard(_malformed)

    def function(self, name: str) -> Callable[..., Any]:
        """A stand-in for a function of the program."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                forms = encode(args), encode(kwargs)
            except RecursionError:
                raise ValueError("an argument of the tests is nested too deeply to be passed") from None
            self.send([name, *forms])
            return self.answer()

        call.__name__ = call.__qualname__ = name
        return call

    def _guard(self, step: Callable[[], Any]) -> Any:
        if self.broken:
            raise Broken(self.broken)
        try:
            return step()
        except (WireError, RecursionError, MemoryError) as error:
            self.broken = f"the program's process: {str(error) or type(error).__name__}"
            raise Broken(self.broken) from None


def _malformed() -> Any:
    raise WireError("malformed answer")


def _exception(names: Any, name: Any, text: Any) -> Exception:
    """The most specific built-in class of the program's exception, except those that end a process or a loop.

    A StopIteration from a stand-in would end the tests' `map` or `for` as if every element had been checked.
    """
    for each in names if isinstance(names, list) else ():
        kind = getattr(builtins, each, None) if isinstance(each, str) else None
        if kind in LOOP_ENDS:
            break
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            try:
                return kind(str(text))
            except TypeError:
                continue  # takes other arguments, such as UnicodeDecodeError
    return CandidateError(f"{name}: {text}"[:500])


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500].removesuffix(": ")


def _line_of(error: BaseException, tests: str) -> str:
    """The line at which the tests stopped."""
    trace, number = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            number = trace.tb_lineno
        trace = trace.tb_next
    return f" at `{tests.splitlines()[number - 1].strip()[:200]}`" if number else ""


sys.setrecursionlimit(1000)
