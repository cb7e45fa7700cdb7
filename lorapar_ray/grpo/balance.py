"""Chooses the number of prompts per step from measured step times: few waste time, many give few updates.

A step of p prompts takes about T(p) = a + b·p seconds: a is the fixed time of a step (the tail of the longest
completion, publishing and checking a policy, the updates' fixed part), b·p is work that engines and learners share.
Samples per second are p / T(p), at most 1/b. The smallest number of prompts that reaches a share s of this maximum is p
= s/(1 − s) · a/b. a and b are fitted to the latest steps, of at least two sizes.

The number of groups in flight per engine needs no such search: `Router` follows the engines' measured speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

SHARE = 0.95
"""Target share of the maximum samples per second."""
REMEMBERED = 8
"""Number of latest steps in the fit."""
LARGEST_MOVE = 2.0
"""Largest factor of change in one step: a fit is unreliable for very different sizes."""
SMALLEST_MOVE = 0.15
"""Smaller changes are noise."""


class Balance:
    """Chooses within bounds; one observation for each step."""

    def __init__(self, prompts: int, bounds: tuple[int, int]) -> None:
        """Begin with `prompts` per step, and stay within `bounds`."""
        self._least, self._most = bounds
        self.prompts = min(self._most, max(self._least, prompts))
        """Prompts of the next step."""
        self._seen: list[tuple[int, float]] = []

    def observe(self, prompts: int, seconds: float) -> None:
        """Record the time of a step of so many prompts, from one policy to the next."""
        self._seen.append((prompts, seconds))
        if len(self._seen) > REMEMBERED:
            sizes = {size for size, _ in self._seen[1:]}
            self._seen.pop(0 if len(sizes) > 1 else 1)  # keep the only step of another size
        wanted = self._wanted()
        wanted = min(LARGEST_MOVE * self.prompts, max(self.prompts / LARGEST_MOVE, wanted))
        if abs(wanted - self.prompts) > SMALLEST_MOVE * self.prompts:
            self.prompts = min(self._most, max(self._least, round(wanted)))

    def _wanted(self) -> float:
        if len({prompts for prompts, _ in self._seen}) == 1:
            return LARGEST_MOVE * self.prompts if self.prompts < self._most else self.prompts / LARGEST_MOVE
        fixed, each = fitted(self._seen)
        if each <= 0:  # larger steps take no longer, as far as measured
            return LARGEST_MOVE * self.prompts
        return SHARE / (1 - SHARE) * max(0.0, fixed) / each

    def state(self) -> list[list[float]]:
        """State for `restore`; the current choice first."""
        return [[self.prompts, 0.0], *([prompts, seconds] for prompts, seconds in self._seen)]

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Continue from `state`."""
        (prompts, _), *seen = state
        self.prompts = int(prompts)
        self._seen = [(int(each), seconds) for each, seconds in seen]


def fitted(seen: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(a, b) of seconds ≈ a + b · prompts, by least squares; there are two sizes at least."""
    middle, mean = fmean(prompts for prompts, _ in seen), fmean(seconds for _, seconds in seen)
    spread = sum((prompts - middle) ** 2 for prompts, _ in seen)
    each = sum((prompts - middle) * (seconds - mean) for prompts, seconds in seen) / spread
    return mean - each * middle, each
