"""The exact cut in a ranking of float32 scores, from integer histograms that merge in any order.

A float32 is mantissa · 2^shift · 2^-149 with an integer mantissa below 2^24, and all values whose top 16 bits agree
share the shift. So one *coarse bin* (top 16 bits) needs two integers, how many elements and the sum of their low 16
bits, to give its summed importance exactly. One pass finds the coarse bin in which a ranking crosses its target, a
second pass counts the low 16 bits inside that bin only, and gives the exact element of the cut. Integer sums are
associative: shards, threads and workers cannot change the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from lorapar_ray.errors import UserError
from lorapar_ray.partition.blocks import INFINITY_BITS

COARSE_BINS = INFINITY_BITS >> 16
FINE_BINS = 1 << 16
_PIECE = 1 << 16  # elements per bincount: its inputs and both histograms stay in a core's cache
_DENORMAL = Fraction(1, 2**149)  # the unit of every integer sum here: float32's smallest positive value


@dataclass(frozen=True)
class Threshold:
    """The cut: every score above bit pattern `bits` is kept, and of those equal to it the first `ties_kept`."""

    bits: int
    ties_kept: int
    kept: int
    total: int

    @property
    def value(self) -> float:
        """The smallest kept score (infinity if none is kept)."""
        return float(np.uint32(self.bits).view(np.float32))

    @property
    def share(self) -> float:
        """Kept elements over all elements, in [0, 1]."""
        return self.kept / self.total


@dataclass(frozen=True)
class Crossing:
    """The coarse bin in which a descending ranking reaches its target.

    `above` elements lie in higher bins; the bin must contribute `missing`, in elements if `by_count`, else in units of
    its own mantissas.
    """

    bin: int
    above: int
    missing: int
    by_count: bool
    total: int

    def refine(self, fine_counts: NDArray[np.int64]) -> Threshold:
        """The exact cut, given how often each low half (int64, 65536 bins) occurs inside this bin."""
        low = np.flatnonzero(fine_counts)[::-1]
        counts = fine_counts[low]
        weights = np.ones_like(low) if self.by_count else _mantissa_base(self.bin) + low
        reached = np.cumsum(counts * weights)  # below 2^63 for up to 5·10^11 elements
        at = int(np.searchsorted(reached, self.missing))
        before = int(reached[at - 1]) if at else 0
        ties_kept = -((before - self.missing) // int(weights[at]))  # ceiling
        kept = self.above + int(counts[:at].sum()) + ties_kept
        return Threshold((self.bin << 16) | int(low[at]), ties_kept, kept, self.total)


class ScoreHistogram:
    """Counts and exact sums of non-negative float32 scores by their top 16 bits; half a megabyte, mergeable."""

    def __init__(self) -> None:
        self.counts = np.zeros(COARSE_BINS, np.int64)
        self.low_sums = np.zeros(COARSE_BINS, np.int64)
        """Per bin, the sum of the low 16 bits: with the count, the bin's summed mantissas."""

    def add(self, bits: NDArray[np.uint32]) -> None:
        """Count checked score bits (see `blocks.checked_bits`), any number of them."""
        low_high = bits.view(np.uint16)  # little-endian, as safetensors is
        for start in range(0, low_high.size, 2 * _PIECE):
            low, high = low_high[start : start + 2 * _PIECE].reshape(-1, 2).T
            counts = np.bincount(high)
            self.counts[: counts.size] += counts
            # float64 weights are exact: a piece sums to less than 2^32
            self.low_sums[: counts.size] += np.bincount(high, weights=low).astype(np.int64)

    def merge(self, other: ScoreHistogram) -> None:
        """Add the elements that `other` has counted."""
        self.counts += other.counts
        self.low_sums += other.low_sums

    @property
    def elements(self) -> int:
        return int(self.counts.sum())

    @property
    def importance(self) -> Fraction:
        """ΣI, exactly."""
        return self._units() * _DENORMAL

    def crossing_share(self, theta: float) -> Crossing:
        """The end of the smallest top set that reaches θ · ΣI; at θ = 1, after the last element.

        θ is read as its printed decimal: 0.9 is 9/10 here, not the slightly larger double. The paper's θ = 1 is the
            full adapter, so it also keeps elements of zero importance, which a smallest set would not contain.

        Raises:
            UserError: θ outside (0, 1], or every score is zero.
        """
        check_theta(theta)
        total = self._units()
        if total == 0:
            raise UserError(
                "every importance score is zero; score after a warm-up (adapter.warmup_steps) or use init: gaussian"
            )
        if theta == 1:
            return self.crossing_count(self.elements)
        exact = Fraction(str(float(theta)))
        missing = -(-exact.numerator * total // exact.denominator)
        above = 0
        for bin, count, mantissas in self._descending():
            mass = mantissas << _shift(bin)
            if mass >= missing:
                return Crossing(bin, above, -(-missing >> _shift(bin)), False, self.elements)
            missing -= mass
            above += count
        raise AssertionError("a share of at most 1 is reached within the histogram")

    def crossing_count(self, count: int) -> Crossing:
        """The end of the `count` most important elements.

        Raises:
            ValueError: `count` outside 1 … number of elements.
        """
        above = 0
        for bin, here, _ in self._descending():
            if above + here >= count > 0:
                return Crossing(bin, above, count - above, True, self.elements)
            above += here
        raise ValueError(f"cannot keep {count} of {self.elements} elements")

    def _descending(self) -> Iterator[tuple[int, int, int]]:
        """(bin, elements, summed mantissas) of the bins in use, highest first."""
        for bin in np.flatnonzero(self.counts)[::-1].tolist():
            count = int(self.counts[bin])
            yield bin, count, _mantissa_base(bin) * count + int(self.low_sums[bin])

    def _units(self) -> int:
        return sum(mantissas << _shift(bin) for bin, _, mantissas in self._descending())


def low_halves(bits: NDArray[np.uint32], bins: set[int]) -> dict[int, NDArray[np.uint16]]:
    """For each coarse bin of `bins`, the low 16 bits of the elements in it, for `Crossing.refine` to count."""
    low_high = bits.view(np.uint16)
    found: dict[int, list[NDArray[np.uint16]]] = {bin: [] for bin in bins}
    for start in range(0, low_high.size, 2 * _PIECE):
        low, high = low_high[start : start + 2 * _PIECE].reshape(-1, 2).T
        for bin in bins:
            found[bin].append(low[high == bin])
    return {bin: np.concatenate(pieces) for bin, pieces in found.items() if pieces}


def check_theta(theta: float) -> None:
    """Raise UserError unless θ is in (0, 1]."""
    if not 0 < theta <= 1:
        raise UserError(f"partition.theta must be in (0, 1], got {theta}")


def _shift(bin: int) -> int:
    """log2 of this bin's mantissa unit over float32's smallest positive value; denormals share the first exponent's."""
    return max((bin >> 7) - 1, 0)


def _mantissa_base(bin: int) -> int:
    """The mantissa of the bin's smallest value, implicit leading one included."""
    return ((bin & 0x7F) | (0x80 if bin >> 7 else 0)) << 16
