"""Percentiles of a stream in constant memory."""

from __future__ import annotations

from collections import Counter
from math import ceil, floor, log

RATIO = 1.02
"""Neighbouring bins differ by 2 %, and so may a percentile from the exact one."""
SMALLEST_S = 1e-6


class Durations:
    """Seconds, counted in bins of equal ratio."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._bins[floor(log(max(seconds, SMALLEST_S)) / log(RATIO))] += 1

    def percentile(self, share: float) -> float | None:
        """The smallest value that `share` (0 to 100) per cent do not exceed, to 2 %; None if nothing was added."""
        rank, reached = max(1, ceil(share / 100 * self._bins.total())), 0
        for bin_, count in sorted(self._bins.items()):
            reached += count
            if reached >= rank:
                return float(RATIO ** (bin_ + 0.5))
        return None
