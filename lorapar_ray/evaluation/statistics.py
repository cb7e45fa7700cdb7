"""Statistics of right answers: intervals, pass@k and paired comparisons. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

from lorapar_ray.errors import UserError

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(correct: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): sound for small n and for shares near 0 or 1.

    Raises:
        ValueError: n < 1, or correct outside 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"need 0 <= correct <= n and n >= 1, got {correct} of {n}")
    share = correct / n
    centre = share + z * z / (2 * n)
    spread = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return 0.0 if correct == 0 else low, 1.0 if correct == n else high  # exact bounds, without rounding errors


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes, from n samples of which `correct` pass.

    1 − C(n − c, k) / C(n, k) (Chen et al. 2021, equation 1), as a product, which overflows nowhere; c / n for k = 1.

    Raises:
        UserError: k > n, or k < 1.
        ValueError: correct outside 0..n.
    """
    if not 1 <= k <= n:
        raise UserError(f"pass@k: k = {k} needs at least {max(k, 1)} samples of each question; there are {n}")
    if not 0 <= correct <= n:
        raise ValueError(f"need 0 <= correct <= n, got {correct} of {n}")
    if n - correct < k:
        return 1.0
    return 1.0 - prod(1.0 - k / each for each in range(n - correct + 1, n + 1))


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions, the second against the first."""

    n: int
    gained: int
    """Questions that the second alone has right."""
    lost: int
    """Questions that the first alone has right."""
    difference: float
    """(gained − lost) / n, the second's accuracy less the first's."""
    interval: tuple[float, float]
    """95 %, of the difference."""
    p: float
    """Exact McNemar, two-sided."""


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two models, right or wrong on each of the same questions in the same order.

    Raises:
        ValueError: no questions, or not as many of both.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"need the same questions, at least one, got {len(first)} and {len(second)}")
    both = sum(a and b for a, b in zip(first, second, strict=True))
    lost, gained, n = sum(first) - both, sum(second) - both, len(first)
    return Paired(
        n, gained, lost, (gained - lost) / n, newcombe_interval(both, gained, lost, n), mcnemar_exact(gained, lost)
    )


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test (McNemar 1947); null hypothesis: each changed question is gained or lost by
    chance.

    Twice the binomial tail, at most 1; 1 if no question changed.
    """
    changed = gained + lost
    term = total = 1
    for each in range(min(gained, lost)):
        term = term * (changed - each) // (each + 1)
        total += term
    return min(1.0, 2 * total / 2**changed)


def newcombe_interval(both: int, gained: int, lost: int, n: int) -> tuple[float, float]:
    """Interval of the difference of two paired proportions (Newcombe 1998, method 10): from Wilson's of each.

    Args:
        both: questions right in both; `gained` in the second alone, `lost` in the first alone, of `n`.
    """
    neither = n - both - gained - lost
    ours, theirs = (both + gained) / n, (both + lost) / n
    (low, high), (their_low, their_high) = wilson_interval(both + gained, n), wilson_interval(both + lost, n)
    product = (both + gained) * (neither + lost) * (both + lost) * (neither + gained)
    excess = float(both * neither - gained * lost)
    if excess > 0:
        excess = max(0.0, excess - n / 2)  # the continuity correction
    phi = 0.0 if product == 0 else excess / sqrt(product)

    def reach(own: float, other: float) -> float:
        return sqrt(max(0.0, own * own - 2 * phi * own * other + other * other))

    difference = (gained - lost) / n
    return (
        max(-1.0, difference - reach(ours - low, their_high - theirs)),
        min(1.0, difference + reach(high - ours, theirs - their_low)),
    )
