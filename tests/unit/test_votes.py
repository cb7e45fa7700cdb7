"""Counting votes: majorities, calibration, agreement, and which teacher comes next."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lorapar_ray.config import LabelConfig
from lorapar_ray.labeling.prompts import numbers, rotations
from lorapar_ray.labeling.store import Answer
from lorapar_ray.labeling.votes import (
    Agreement,
    Vote,
    average_log_probs,
    balanced,
    calibrated,
    fewest_to_decide,
    lead,
    majority,
    normalised,
    number_bias,
)
from lorapar_ray.labeling.voting import vote_of, votes_of, whom_to_ask
from tests.majority import majority_accuracy
from tests.unit.votes import answer, panel, vote


def test_majority_ties_weights_and_silence() -> None:
    decision = majority([vote("a", 1), vote("b", 2), vote("c", 2, 0.6)])
    assert decision is not None
    assert (decision.system, round(decision.agreement, 3), decision.confidence) == (2, 0.667, 0.7)
    tie = majority([vote("a", 1, 0.6), vote("b", 2, 0.9)])
    assert tie is not None and tie.system == 2
    level = majority([vote("a", 2, 0.6), vote("b", 1, 0.6)])
    assert level is not None and level.system == 1
    sure = majority([vote("a", 1, 0.55), vote("b", 1, 0.55), vote("c", 2, 1.2 - 0.05)], "confidence")
    assert sure is not None and (sure.system, round(sure.agreement, 3)) == (2, round(1.15 / 2.25, 3))
    assert majority([]) is None


@given(
    systems=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    sure=st.lists(st.floats(0.34, 1.0), min_size=9, max_size=9),
    weights=st.sampled_from(["equal", "confidence"]),
)
def test_sequential_voting_ends_where_full_voting_does(systems: list[int], sure: list[float], weights: Any) -> None:
    votes = [vote(str(i), system, sure[i]) for i, system in enumerate(systems)]
    cast: list[Vote] = []
    while further := fewest_to_decide(lead(cast, weights), len(votes) - len(cast)):
        cast += votes[len(cast) : len(cast) + further]
    full, early = majority(votes, weights), majority(cast, weights)
    assert full is not None and early is not None and early.system == full.system
    if weights == "equal" and len(set(systems)) == 1:
        assert len(cast) == len(votes) // 2 + 1


@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_majority_over_100_000_rows_is_as_accurate_as_the_binomial_says(n: int) -> None:
    rows, p = 100_000, 0.7
    label = panel(*map(str, range(n)), sequential=n == 5)
    keys = {teacher.name: [teacher.name.encode()] for teacher in label.teachers}
    draws = np.random.default_rng(n).random((rows, n)) < p
    correct = asked = 0
    # our code is pure, so it runs once for each of the 2^n patterns of right and wrong teachers
    for pattern, times in Counter(map(tuple, draws.tolist())).items():
        knows = {name: answer(-2.0 if right else 2.0) for name, right in zip(keys, pattern, strict=True)}
        found: dict[bytes, Answer] = {}
        while names := whom_to_ask(
            label, votes_of(label, keys, found, {}), [k for k in keys if k.encode() not in found]
        ):
            found |= {keys[name][0]: knows[name] for name in names}
        decision = majority(votes_of(label, keys, found, {}))
        correct += times * (decision is not None and decision.system == 1)
        asked += times * len(found)
    expected = majority_accuracy(p, n)
    assert abs(correct / rows - expected) < 3.3 * math.sqrt(expected * (1 - expected) / rows)  # 99.9 %
    assert asked == rows * n if n < 5 else asked < 0.9 * rows * n


def test_calibration_divides_the_bias_out() -> None:
    biased = [math.log(0.9), math.log(0.1)]
    assert calibrated(biased, biased) == pytest.approx([0.5, 0.5])
    assert calibrated(biased, [0.0, 0.0]) == pytest.approx([0.9, 0.1])
    assert average_log_probs([[math.log(0.2)], [math.log(0.4)]]) == pytest.approx([math.log(0.3)])
    assert vote_of("a", [answer(-1.0)], [0.0, 0.0]).system == 1
    assert vote_of("a", [answer(-1.0)], normalised([0.0, -1.5])).system == 2


@pytest.mark.parametrize("count", [2, 3])
def test_swapped_definitions_remove_a_leaning_to_a_number_exactly(count: int) -> None:
    label = panel(
        "a", definitions={k: f"kind {k}" for k in range(1, count + 1)}, examples=[], calibration="swapped_definitions"
    )
    judgement, leaning = [0.3, -0.2, 0.1][:count], [0.0, 3.0, -1.0][:count]  # by System; by number
    rotated = []
    for rotation in rotations(label):
        shown = numbers(label, rotation)
        by_number = normalised([judgement[shown.index(n + 1)] + leaning[n] for n in range(count)])
        rotated.append([by_number[number - 1] for number in shown])
    assert len(rotated) == count
    assert np.ptp(np.subtract(balanced(rotated), judgement)) < 1e-12
    assert np.ptp(np.subtract(number_bias(rotated), leaning)) < 1e-12
    assert vote_of("a", [Answer(each, 1, 0.1) for each in rotated], None).system == 1


def test_log_probabilities_are_cleaned_or_refused() -> None:
    assert normalised([-1.0, -math.inf]) == pytest.approx([0.0, -30.0], abs=1e-9)
    assert sum(map(math.exp, normalised([5.0, 4.0]))) == pytest.approx(1.0)
    for bad in ([math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="not numbers"):
            normalised(bad)


def test_kappa_and_agreement_by_hand() -> None:
    def kappa(*rows: list[int]) -> float | None:
        agreement = Agreement()
        for row in rows:
            agreement.add([vote(str(i), system) for i, system in enumerate(row)])
        return agreement.fleiss_kappa()

    assert kappa([1, 1, 1], [2, 2, 2]) == pytest.approx(1.0)
    assert kappa([1, 2], [2, 1]) == pytest.approx(-1.0)
    assert kappa([1, 1], [1, 1]) is None
    assert kappa([1, 1], [2, 2], [1, 2], [1, 1, 2]) == pytest.approx(1 / 3)  # two raters are most common
    assert kappa([1]) is None and Agreement().fleiss_kappa() is None
    agreement = Agreement()
    agreement.add([vote("a", 1), vote("b", 1)])
    agreement.add([vote("a", 1), vote("b", 2)])
    assert agreement.pairwise() == {"a": {"b": 0.5}, "b": {"a": 0.5}}


def test_systems_are_numbered_one_to_k() -> None:
    numbers, key = "numbered 1 to K", r"definitions\.0\.\[key\]"
    for bad, why in (({1: "a"}, numbers), ({0: "a", 1: "b"}, key), ({1: "a", 3: "b"}, numbers)):
        with pytest.raises(ValidationError, match=why):
            panel("a", definitions=bad, examples=[])
    with pytest.raises(ValidationError, match="System 3 has no definition"):
        panel("a", examples=[{"question": "q", "answer": "a", "system": 3}])


def test_the_cheapest_are_asked_first_and_only_as_many_as_could_decide() -> None:
    prices = {"dear": 5.0, "free": 0.0, "cheap": 1.0}
    teachers = [{"name": n, "kind": "python", "model": "m:T", "cost_per_million_tokens": p} for n, p in prices.items()]
    label = LabelConfig.model_validate({"teachers": teachers, "sequential": True})
    assert whom_to_ask(label, [], list(prices)) == ["free", "cheap"]
    assert whom_to_ask(label, [vote("free", 1), vote("cheap", 2)], ["dear"]) == ["dear"]
    assert whom_to_ask(label, [vote("free", 1), vote("cheap", 1)], ["dear"]) == []
    assert whom_to_ask(label, [vote("free", 1)], ["dear"]) == ["dear"]  # cheap has failed: a tie is still possible
    at_once = label.model_copy(update={"sequential": False})
    assert whom_to_ask(at_once, [], list(prices)) == ["free", "cheap", "dear"]
