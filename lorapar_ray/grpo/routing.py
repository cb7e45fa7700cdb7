"""Chooses the engine for a group, by load, measured speed, and prompts that engines have seen.

An engine's in-flight cap is a few times its batch, and less if it is slower than the others; else the last groups of a
step would all wait for it. Among engines with about equal load, one that recently got a prompt with the same prefix
comes first: it has that prefix in its cache.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 64
"""Block size, in tokens, for the comparison of prompt prefixes."""
BLOCKS = 8
"""Most blocks of a prompt, so that the cost does not grow with its length."""
REMEMBERED = 256
"""Latest prefixes that are remembered per engine."""
SLACK = 1
"""An engine that has the prefix may have this many more groups in flight than the least loaded one."""
DECAY = 0.95
"""Weight of a new measurement: about the last twenty groups count."""
DURATIONS = 64


class Router:
    """Loads, speeds and remembered prompts of the engines in `size` places."""

    def __init__(self, size: int, at_once: int) -> None:
        """`at_once`: groups in flight per engine, at most."""
        self._at_once = at_once
        self._least = -(-at_once // 2)  # enough to keep its batch full, so that its speed can be measured
        self.load = [0] * size
        """Groups in flight of each engine."""
        self._busy_since, self._busy_s = [0.0] * size, 0.0
        self._tokens, self._seconds = [0.0] * size, [0.0] * size
        self._since: list[float | None] = [None] * size
        self._rates, self._caps = [0.0] * size, [at_once] * size
        self._seen: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(size)]
        self._durations: deque[float] = deque(maxlen=DURATIONS)

    def cap(self, slot: int) -> int:
        """An engine's current in-flight cap, in groups."""
        return self._caps[slot]

    def choose(self, slots: Iterable[int], beginnings: Sequence[int] = ()) -> int | None:
        """The next engine among `slots`; None: all are at their cap."""
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
        """Reset a place for a new engine."""
        self._tokens[slot] = self._seconds[slot] = self._rates[slot] = 0.0
        self._caps[slot] = self._at_once
        self._seen[slot].clear()

    def busy_seconds(self, now: float) -> float:
        """Seconds with a group, summed over the places."""
        return self._busy_s + sum(now - since for since, load in zip(self._busy_since, self.load, strict=True) if load)

    @property
    def typical(self) -> float | None:
        """Median seconds of the latest `DURATIONS` groups; None until there are so many."""
        return median(self._durations) if len(self._durations) == DURATIONS else None

    def _measure(self, slot: int) -> None:
        """Changes one engine at a time: the others' caps follow when they are measured."""
        if self._seconds[slot]:
            self._rates[slot] = rate = self._tokens[slot] / self._seconds[slot]
            share = rate / max(self._rates) if rate else 1.0
            self._caps[slot] = min(self._at_once, max(self._least, round(self._at_once * share)))

    def _shared(self, slot: int, beginnings: Sequence[int]) -> int:
        seen = self._seen[slot]
        return next((at for at, beginning in enumerate(beginnings) if beginning not in seen), len(beginnings))


def beginnings_of(prompt_ids: Sequence[int] | NDArray[Any]) -> list[int]:
    """Hashes of a prompt's first one, two, … blocks."""
    found, known, ids = [], 0, np.asarray(prompt_ids[: BLOCK * BLOCKS], np.int32)
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        known = hash((known, ids[start : start + BLOCK].tobytes()))
        found.append(known)
    return found
