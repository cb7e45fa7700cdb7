"""Makes foreign text safe to show: text of a teacher, an endpoint, a file name or a model is data, never layout.

A control character can move a terminal's cursor or forge a line of output, a lone surrogate cannot be encoded, and
square brackets are markup to `rich`. All foreign text that this project prints, plots or writes down goes through
here.
"""

from __future__ import annotations

import re
from typing import Any

from rich.markup import escape

from lorapar_ray.redact import redact

REASON_LENGTH = 160
_UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u2028\u2029"  # line and paragraph separators: `str.splitlines` cuts there
    "\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that reorder what is read
    "\ud800-\udfff\ufffe\uffff]"  # lone surrogates and non-characters: not to be encoded, or no XML
)


def printable(text: str) -> str:
    """`text` with control characters, reordering marks and lone surrogates as Python escapes.

    Tabs and newlines stay.
    """
    return _UNSHOWABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def shown(text: str) -> str:
    """`printable`, with known secrets taken out."""
    return printable(redact(text))


def one_line(value: Any, limit: int | None = None) -> str:
    """`shown` on one line, cut after `limit` characters; secrets are taken out before anything is cut."""
    line = shown(" ".join(str(value).split()))
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def final_line(value: Any, limit: int | None = None) -> str:
    """The last line that is not empty, as `one_line`: a traceback ends in its error."""
    return one_line(next((line for line in reversed(str(value).splitlines()) if line.strip()), ""), limit)


def reason(error: BaseException, limit: int = REASON_LENGTH) -> str:
    """An error in one short line; an error from a Ray task contains a whole remote traceback."""
    cause = getattr(error, "cause", None) or error
    said = one_line(cause, limit)
    return f"{type(cause).__name__}: {said}" if said else type(cause).__name__


def markup(value: Any) -> str:
    """`shown`, as literal text within `rich` markup."""
    return escape(shown(str(value)))
