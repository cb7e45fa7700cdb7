"""The parts of a written number or sum. The patterns read a character a bounded number of times: 10,000 digits take
10,000 steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "number", "operator", "open", "close", "fraction", "percent", "scale", "equals", "word", "command", "other"
]

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_WHOLE = r"(?:\d{1,3}(?:,\d{3}){1,400}+(?!\d)|\d{1,2}(?:,\d{2}(?!\d)){1,400}+,\d{3}(?!\d)|\d++)"
_TOKEN = re.compile(
    rf"""
    (?P<number>(?:(?<!\d)(?<!\d\.){_WHOLE}(?:\.\d++)?+|(?<![\d.])\.\d++)(?!\.?\d)(?:[eE][-+]?\d++(?!\w))?+)
    |(?P<version>\d++(?:\.\d++)++)
    |(?P<fraction>\\frac(?![A-Za-z]))
    |(?P<command>\\[A-Za-z]++)
    |(?P<operator>\*\*|[-+*/^])
    |(?P<open>[({{])|(?P<close>[)}}])
    |(?P<percent>%|per\s?cent\b)
    |(?P<equals>=)
    |(?P<word>[^\W\d_]++(?:['’][^\W\d_]++)?+)
    |(?P<other>\n|[^\s$€£¥₹])
    """,
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Token:
    """One part of a text; `start` and `end` are its position."""

    kind: Kind
    text: str
    start: int
    end: int

    def touches(self, after: Token) -> bool:
        """Whether the next token follows directly."""
        return self.end == after.start


def tokens_of(text: str) -> list[Token]:
    """The parts of a text in `plain_writing`; without spaces and currency signs, with line ends."""
    found = []
    for match in _TOKEN.finditer(text):
        kind, part = str(match.lastgroup), match.group()
        if kind == "version":  # 1.2.3 is not a number
            kind = "other"
        if kind == "word" and part.lower().removesuffix("s") in SCALES:
            kind = "scale"
        found.append(Token(kind, part, match.start(), match.end()))  # type: ignore[arg-type]
    return found
