"""Which engine a group goes to: plain bookkeeping of load, measured speed, and prompts that engines have seen.

An engine holds a few fillings of its batch at most, and fewer where it is slower than the others, or the last groups
of a step would all be its. Among engines that are about equally full, one that has lately been given a prompt with the
same beginning goes first: it has the key-value entries.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 64
"""Tokens by which beginnings of prompts are compared."""
BLOCKS = 8
"""Of a prompt, at most: the cost does not grow with its length."""
REMEMBERED = 256
"""Beginnings that are remembered of each engine, the latest."""
SLACK = 1
"""Groups by which an engine that knows a beginning may be fuller than the emptiest."""
DECAY = 0.95
"""Of what was measured, with every group: the last twenty or so count."""
DURATIONS = 64


class Router:
    """Loads, speeds and remembered prompts of the engines in `size` places."""

    def __init__(self, size: int, at_once: int) -> None:
        """`at_once`: groups an engine holds at most."""
        self._at_once = at_once
        self._least = -(-at_once // 2)  # enough to keep its batch full, so that it shows what it can do
        self.load = [0] * size
        """Groups each engine holds."""
        self._busy_since, self._busy_s = [0.0] * size, 0.0
        self._tokens, self._seconds = [0.0] * size, [0.0] * size
        self._since: list[float | None] = [None] * size
        self._rates, self._caps = [0.0] * size, [at_once] * size
        self._seen: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(size)]
        self._durations: deque[float] = deque(maxlen=DURATIONS)

    def cap(self, slot: int) -> int:
        """Groups that an engine may hold now."""
        return self._caps[slot]

    def choose(self, slots: Iterable[int], beginnings: Sequence[int] = ()) -> int | None:
        """The engine among `slots` that is asked next; None: all are full."""
        free = [slot for slot in slots if self.load[slot] < self._caps[slot]]
        if not free:
            return None
        emptiest = min(self.load[slot] for slot in free)
        near = [slot for slot in free if self.load[slot] <= emptiest + SLACK]
        return max(near, key=lambda slot: (self._shared(slot, beginnings), -self.load[slot], -slot))

    def begin(self, slot: int, beginnings: Sequence[int], now: float) -> None:
        """An engine is given a group."""
        if self.load[slot] == 0:
            self._busy_since[slot] = now
        self.load[slot] += 1
        if self.load[slot] == self._least:
            self._since[slot] = now
        seen = self._seen[slot]
        for beginning in beginnings:
            seen[beginning] = None
            seen.move_to_end(beginning)
        while len(seen) > REMEMBERED:
            seen.popitem(last=False)

    def end(self, slot: int, now: float, tokens: int = 0, duration: float | None = None) -> None:
        """A group has left an engine, with so many tokens sampled there; its speed counts while its batch was full."""
        if (since := self._since[slot]) is not None:
            self._tokens[slot] = DECAY * self._tokens[slot] + tokens
            self._seconds[slot] = DECAY * self._seconds[slot] + now - since
            self._since[slot] = now if self.load[slot] > self._least else None
            self._measure(slot)
        self.load[slot] -= 1
        if self.load[slot] == 0:
            self._busy_s += now - self._busy_since[slot]
        if duration is not None:
            self._durations.append(duration)

    def forget(self, slot: int) -> None:
        """Another engine takes the place."""
        self._tokens[slot] = self._seconds[slot] = self._rates[slot] = 0.0
        self._caps[slot] = self._at_once
        self._seen[slot].clear()

    def busy_seconds(self, now: float) -> float:
        """Seconds with a group, summed over the places."""
        return self._busy_s + sum(now - since for since, load in zip(self._busy_since, self.load, strict=True) if load)

    @property
    def typical(self) -> float | None:
        """Seconds that a group takes, in the median of the last ones; None until there are enough."""
        return median(self._durations) if len(self._durations) == DURATIONS else None

    def _measure(self, slot: int) -> None:
        """Of one engine at a time: the others' caps follow when they are measured."""
        if self._seconds[slot]:
            self._rates[slot] = rate = self._tokens[slot] / self._seconds[slot]
            share = rate / max(self._rates) if rate else 1.0
            self._caps[slot] = min(self._at_once, max(self._least, round(self._at_once * share)))

    def _shared(self, slot: int, beginnings: Sequence[int]) -> int:
        seen = self._seen[slot]
        return next((at for at, beginning in enumerate(beginnings) if beginning not in seen), len(beginnings))


def beginnings_of(prompt_ids: Sequence[int] | NDArray[Any]) -> list[int]:
    """Hashes of a prompt's first one, two, … blocks."""
    found, known = [], 0
    for start in range(0, min(len(prompt_ids), BLOCK * BLOCKS) - BLOCK + 1, BLOCK):
        known = hash((known, *prompt_ids[start : start + BLOCK]))
        found.append(known)
    return found
