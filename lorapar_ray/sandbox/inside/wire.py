"""Values between the tests and the program under test: plain data by value, nothing executable.

The receiver builds every value itself, of the exact built-in type, so a sender's class cannot override `__eq__`,
`__bool__` or anything else on the other side. No pickle and no marshal: with both the sender can run code in the
reader, or crash it.

A value is JSON: null, booleans, strings, floats and small integers are unchanged, and everything else is a list that
begins with a tag.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable
from itertools import islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_MESSAGE = 16 * 2**20
"""Bytes. A longer message is refused before it is read."""
MAX_ITERATOR = 100_000
"""An iterator is passed as the list of its elements, if it has at most this many."""
_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
TYPES = {each.__name__: each for each in _PLAIN}
_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "l": list,
    "t": tuple,
    "s": set,
    "f": frozenset,
    "q": deque,
    "I": iter,
}
_SMALL = 2**63


class WireError(Exception):
    """A message or a value that cannot be passed."""


class Closed(WireError):
    """The other side has ended."""


class Opaque:
    """Replaces a value that cannot be passed, such as a match of a regular expression.

    It is true or false, and equal only to itself.
    """

    def __init__(self, truth: bool) -> None:
        self._truth = truth

    def __bool__(self) -> bool:
        return self._truth


def encode(value: Any) -> Any:
    """JSON-ready form of a value; for other kinds only the truth value is sent.

    Subclasses of built-in types (Counter, namedtuple, IntEnum) are sent as the built-in type.

    Raises:
        RecursionError: the value is nested too deeply, or contains itself.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__add__(value, "")
    if isinstance(value, float):
        return float.__add__(value, 0.0) if type(value) is not float else value
    if isinstance(value, int):
        number = int.__add__(value, 0)
        return number if -_SMALL < number < _SMALL else ["i", hex(number)]
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "a", bytes(value).hex()]
    if isinstance(value, dict):
        return ["d", [[encode(key), encode(each)] for key, each in dict.items(value)]]
    for tag, kind in _SEQUENCES.items():
        if tag != "I" and isinstance(value, kind):  # type: ignore[arg-type]
            return [tag, [encode(each) for each in kind.__iter__(value)]]  # type: ignore[attr-defined]
    if isinstance(value, range):
        return ["r", [value.start, value.stop, value.step]]
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return ["y", value.__name__]
    if hasattr(type(value), "__next__"):
        elements = list(islice(value, MAX_ITERATOR + 1))
        if len(elements) <= MAX_ITERATOR:
            return ["I", [encode(each) for each in elements]]
    return ["o", bool(value)]


def decode(form: Any) -> Any:
    """The value of a form made by `encode`, in exact built-in types.

    Raises:
        WireError: the form is unknown.
    """
    if form is None or isinstance(form, (bool, int, float, str)):
        return form
    if not (isinstance(form, list) and form and isinstance(form[0], str)):
        raise WireError("malformed value")
    tag, *parts = form
    try:
        if tag in _SEQUENCES:
            return _SEQUENCES[tag]([decode(each) for each in parts[0]])
        if tag == "d":
            return {decode(key): decode(each) for key, each in parts[0]}
        if tag == "i":
            return int(parts[0], 16)
        if tag == "c":
            return complex(float(parts[0]), float(parts[1]))
        if tag in ("a", "b"):
            return (bytes if tag == "b" else bytearray).fromhex(parts[0])
        if tag == "r":
            return range(*map(int, parts[0]))
        if tag == "y":
            return TYPES[parts[0]]
        if tag == "o":
            return Opaque(parts[0] is True)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise WireError(f"malformed value ({type(error).__name__})") from None
    raise WireError("malformed value")


class Channel:
    """Length-prefixed JSON messages over one file descriptor of a stream socket."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(self, message: Any) -> None:
        """Write one message.

        Raises:
            Closed: the other side has ended.
            WireError: longer than `MAX_MESSAGE`.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_MESSAGE:
            raise WireError(f"value of {len(data)} bytes; at most {MAX_MESSAGE} can be passed")
        view = memoryview(len(data).to_bytes(4, "big") + data)
        try:
            while view:
                view = view[os.write(self.fd, view) :]
        except OSError as error:
            raise Closed(str(error)) from None

    def receive(self) -> Any:
        """Read one message.

        Raises:
            Closed: the other side has ended.
            WireError: too long, or not JSON.
        """
        length = int.from_bytes(self._read(4), "big")
        if length > MAX_MESSAGE:
            raise WireError(f"message of {length} bytes; at most {MAX_MESSAGE} are read")
        try:
            return json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            raise WireError(f"malformed message ({type(error).__name__})") from None

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            try:
                part = os.read(self.fd, min(count, 2**20))
            except OSError as error:
                raise Closed(str(error)) from None
            if not part:
                raise Closed("the other side has ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
