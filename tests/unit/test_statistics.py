"""Intervals, tests and pass@k, compared with values computed by hand and by brute force."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest

from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.statistics import (
    mcnemar_exact,
    newcombe_interval,
    paired,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("n", "correct", "k"), [(5, 0, 2), (5, 1, 2), (5, 3, 2), (5, 5, 5), (6, 2, 3), (4, 3, 2), (7, 4, 1)]
)
def test_pass_at_k_is_the_share_of_all_draws_with_a_pass(n: int, correct: int, k: int) -> None:
    draws = list(combinations(range(n), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(min(draw) < correct for draw in draws) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(200, 13, 1) == pytest.approx(13 / 200)


@pytest.mark.parametrize(("n", "k"), [(3, 5), (3, 0)])
def test_more_draws_than_samples_are_one_line(n: int, k: int) -> None:
    with pytest.raises(UserError, match=rf"pass@k: k = {k} needs at least \d samples of each question; there are 3"):
        pass_at_k(n, 1, k)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        *((0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (0, 10, 2 / 1024), (8, 1, 20 / 512)),
        (12, 2, 2 * (1 + 14 + 91) / 2**14),
        (59, 6, 2 * sum(comb(65, each) for each in range(7)) / 2**65),
    ],
)
def test_mcnemar_by_hand(gained: int, lost: int, p: float) -> None:
    assert mcnemar_exact(gained, lost) == pytest.approx(p, rel=1e-12)
    assert mcnemar_exact(lost, gained) == mcnemar_exact(gained, lost)


def test_mcnemar_of_many_questions_neither_overflows_nor_stalls() -> None:
    assert mcnemar_exact(3000, 3000) == 1.0
    assert 0 <= mcnemar_exact(5000, 1000) < 1e-300


def test_an_interval_of_none_or_all_reaches_the_end_exactly() -> None:
    for n in range(1, 60):
        assert wilson_interval(0, n)[0] == 0.0 and wilson_interval(n, n)[1] == 1.0
    assert wilson_interval(0, 3)[1] == pytest.approx(0.5615, abs=1e-4)


def test_the_paired_interval_by_hand() -> None:
    """36 right in both, 12 gained, 2 lost, none wrong in both.

    Wilson: 48/50 in (0.865393, 0.988955), 38/50 in (0.625874, 0.857011). 36 · 0 − 12 · 2 = −24, so φ = −24 /
    √(48 · 2 · 38 · 12) = −0.114708. Below: √(0.094607² + 2 · 0.114708 · 0.094607 · 0.097011 + 0.097011²) = 0.143070.
    Above: √(0.028955² + 2 · 0.114708 · 0.028955 · 0.134126 + 0.134126²) = 0.140428.
    """
    low, high = newcombe_interval(36, 12, 2, 50)
    assert (low, high) == (pytest.approx(0.2 - 0.143070, abs=2e-6), pytest.approx(0.2 + 0.140428, abs=2e-6))


def test_the_paired_interval_is_symmetric_and_covers() -> None:
    low, high = newcombe_interval(40, 9, 3, 80)
    other_low, other_high = newcombe_interval(40, 3, 9, 80)
    assert (low, high) == (pytest.approx(-other_high), pytest.approx(-other_low))
    assert newcombe_interval(0, 5, 0, 5)[1] == 1.0
    assert newcombe_interval(50, 0, 0, 50) == (pytest.approx(-0.0713, abs=1e-3), pytest.approx(0.0713, abs=1e-3))
    n, chances = 20, (0.4, 0.2, 0.1, 0.3)  # both, gained, lost, neither: every outcome with its probability
    covered = 0.0
    for both in range(n + 1):
        for gained in range(n + 1 - both):
            for lost in range(n + 1 - both - gained):
                rest = n - both - gained - lost
                ways = comb(n, both) * comb(n - both, gained) * comb(n - both - gained, lost)
                chance = ways * chances[0] ** both * chances[1] ** gained * chances[2] ** lost * chances[3] ** rest
                low, high = newcombe_interval(both, gained, lost, n)
                covered += chance * (low <= 0.1 <= high)
    assert 0.94 < covered < 0.98


def test_two_models_on_the_same_questions() -> None:
    first = [True] * 6 + [False] * 10
    second = [True] * 5 + [False] + [True] * 7 + [False] * 3
    found = paired(first, second)
    assert (found.n, found.gained, found.lost, found.difference) == (16, 7, 1, 6 / 16)
    assert found.p == pytest.approx(18 / 256)
    assert found.interval == newcombe_interval(5, 7, 1, 16)
    for bad in ([], [True]):
        with pytest.raises(ValueError, match="same questions"):
            paired(bad, [])
