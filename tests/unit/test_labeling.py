"""Votes, prompts and summaries."""

import math
import random

import pytest

from lorapar_ray.config import LabelConfig, VoteExample
from lorapar_ray.labeling.prompts import voting_prompt
from lorapar_ray.labeling.summary import render, summarise
from lorapar_ray.labeling.votes import (
    Vote,
    average_log_probs,
    binomial_majority_accuracy,
    calibrated,
    decided,
    fleiss_kappa,
    majority,
    pairwise_agreement,
)


def vote(teacher: str, system: int, confidence: float = 0.8) -> Vote:
    return Vote(teacher, system, confidence, 0.1)


def test_majority_ties_and_silence() -> None:
    decision = majority([vote("a", 1), vote("b", 2), vote("c", 2, 0.6)])
    assert decision is not None
    assert (decision.system, round(decision.agreement, 3), decision.confidence) == (2, 0.667, 0.7)
    tie = majority([vote("a", 1, 0.6), vote("b", 2, 0.9)])
    assert tie is not None and tie.system == 2
    level = majority([vote("a", 2, 0.6), vote("b", 1, 0.6)])
    assert level is not None and level.system == 1
    assert majority([]) is None


def test_sequential_voting_stops_when_nothing_can_change() -> None:
    assert decided([vote("a", 1), vote("b", 1)], remaining=1)
    assert not decided([vote("a", 1), vote("b", 2)], remaining=1)
    assert not decided([vote("a", 1)], remaining=2)
    assert decided([vote("a", 1)], remaining=0)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("p", [0.6, 0.8])
def test_the_majority_is_as_accurate_as_the_binomial_says(n: int, p: float) -> None:
    rows, rng = 100_000, random.Random(n)
    right = 0
    for _ in range(rows):
        found = majority([vote(str(i), 1 if rng.random() < p else 2) for i in range(n)])
        right += found is not None and found.system == 1
    expected = binomial_majority_accuracy(p, n)
    assert abs(right / rows - expected) < 4 * math.sqrt(expected * (1 - expected) / rows)


def test_calibration_divides_the_bias_out() -> None:
    biased = [math.log(0.9), math.log(0.1)]
    assert calibrated(biased, biased) == pytest.approx([0.5, 0.5])
    assert calibrated(biased, [0.0, 0.0]) == pytest.approx([0.9, 0.1])
    assert average_log_probs([[math.log(0.2)], [math.log(0.4)]]) == pytest.approx([math.log(0.3)])


def test_kappa_and_agreement_by_hand() -> None:
    assert fleiss_kappa([[1, 1, 1], [2, 2, 2]]) == pytest.approx(1.0)
    assert fleiss_kappa([[1, 2], [2, 1]]) == pytest.approx(-1.0)
    assert fleiss_kappa([[1, 1], [1, 1]]) is None
    table = pairwise_agreement([[vote("a", 1), vote("b", 1)], [vote("a", 1), vote("b", 2)]])
    assert table == {"a": {"b": 0.5}, "b": {"a": 0.5}}


def test_the_question_comes_last_behind_a_shared_prefix() -> None:
    settings = {
        "definitions": {1: "at once", 2: "step by step"},
        "examples": [VoteExample(question="2+2", answer="4", system=1)],
        "student": "tiny",
    }
    one, other = (voting_prompt(question, "7", **settings) for question in ("How many?", "Why?"))
    assert one.startswith("Act as the language model tiny.")
    assert one.endswith("Question: How many?\nAnswer: 7\nSystem:")
    assert one.split("How many?")[0] == other.split("Why?")[0]
    assert not voting_prompt("q", "a", **{**settings, "student": None}).startswith("Act as")


def test_the_summary_counts_what_happened() -> None:
    config = LabelConfig.model_validate({"teachers": [{"name": "a", "model": "m"}, {"name": "b", "model": "m"}]})
    rows = [
        {
            "id": str(i),
            "prompt": f"q{i}",
            "answer": "1",
            "task": "sum" if i else "count",
            "difficulty": "",
            "system": 1,
            "votes": [vars(vote("a", 1)), *([vars(vote("b", 2))] if i else [])],
        }
        for i in range(3)
    ]
    summary = summarise(config, rows, 1, {"a": [math.log(0.6), math.log(0.4)]}, 2.0)
    assert summary["split"] == {"1": 3, "2": 0}
    assert summary["teachers"]["b"]["abstained"] == 1
    assert summary["teachers"]["a"]["bias"] == pytest.approx(math.log(0.4 / 0.6), abs=1e-3)
    assert summary["by_task"] == {"count": {"1": 1, "2": 0}, "sum": {"1": 2, "2": 0}}
    assert len(summary["disagreements"]) == 2
    assert summary["votes_per_second"] == 2.5
    assert summary["warnings"] == ["no question is labelled System 2"]
    assert "no question is labelled System 2" in render(summary)
