"""Quantiles of Student's t distribution."""

from __future__ import annotations

from math import atan, cos, inf, nextafter, pi, sin, sqrt


def student_t(df: int, level: float) -> float:
    """The t whose interval ±t holds a share of `level` of the distribution: for 0.95 its 97.5 % quantile.

    Args:
        df: degrees of freedom, at least 1.
        level: above 0 and below 1.
    """
    low, high = 0.0, 1.0
    while within(df, high) < level:
        low, high = high, 2 * high
    while nextafter(low, inf) < high and high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if within(df, middle) < level else (low, middle)
    return (low + high) / 2


def within(df: int, t: float) -> float:
    """The chance that |T| < t (Abramowitz and Stegun, 26.7.3 and 26.7.4: a finite sum for whole degrees of freedom)."""
    angle = atan(t / sqrt(df))
    odd = df % 2
    term = cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, df - 1, 2):
        total += term
        term *= cos(angle) ** 2 * (power + 1) / (power + 2)
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
