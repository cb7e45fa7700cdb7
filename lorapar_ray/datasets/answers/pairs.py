"""Opening marks with their closing ones, in time that grows with the text: an opening one that is never closed, written
a thousand times by a model in a loop, would make a lazy pattern read the rest of the text a thousand times."""

from __future__ import annotations

import re
from collections.abc import Iterator

Pair = tuple[re.Match[str], re.Match[str]]


def pairs(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> Iterator[Pair]:
    """Each opening mark with the next closing one, from left to right, whatever opens between them."""
    place = 0
    while (opened := opening.search(text, place)) and (closed := closing.search(text, opened.end())):
        yield opened, closed
        place = closed.end()
