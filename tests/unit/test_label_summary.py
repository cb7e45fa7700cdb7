"""The summary of a labelling session."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from lorapar_ray.config import LabelConfig
from lorapar_ray.datasets.rows import Row
from lorapar_ray.labeling.percentiles import Durations
from lorapar_ray.labeling.summary import Session, Tally, render
from tests.unit.votes import answer, panel, vote


def test_percentiles_of_a_stream_are_those_of_the_list() -> None:
    values, durations = np.random.default_rng(0).lognormal(size=5000), Durations()
    assert durations.percentile(50) is None
    for value in values:
        durations.add(float(value))
    for share in (50, 95, 99):
        assert durations.percentile(share) == pytest.approx(float(np.percentile(values, share)), rel=0.03)


def test_the_summary_counts_what_happened() -> None:
    teachers = [
        {"name": "a", "model": "m", "cost_per_million_tokens": 1000.0, "cost_per_hour": 36.0},
        {"name": "b", "model": "m"},
    ]
    label = LabelConfig.model_validate({"teachers": teachers})
    tally = Tally(label, {"a": [math.log(0.6), math.log(0.4)]}, seed=0, run="now")
    for i in range(3):
        row = Row(str(i), f"q{i}", "1", "1", "sum" if i else "count")
        votes = [vote("a", 1), *([vote("b", 2)] if i else [])]
        answers = {"a": [answer(-1.0, "now")], **({"b": [answer(1.0, "earlier")]} if i else {})}
        tally.add(row, 1, votes, answers, failed=[] if i else ["b"])
    tally.abstain(["a", "b"])
    session = Session(run="now", votes=3, starting_s=8.0, asking_s=2.0, dead={"b": "16 failures in a row"})
    summary = tally.summary(rejected=1, session=session)
    assert summary["split"] == {"1": 3, "2": 0}
    a, b = summary["teachers"]["a"], summary["teachers"]["b"]
    assert (a["abstained"], b["abstained"], a["not_asked"], b["from_cache"]) == (1, 2, 0, 2)
    assert a["bias"]["1"] - a["bias"]["2"] == pytest.approx(math.log(0.6 / 0.4), abs=1e-3)
    assert a["cost"] == pytest.approx(300 * 1000 / 1e6 + 36 * 10 / 3600, abs=1e-4)
    assert a["latency"]["p50"] == pytest.approx(0.5, rel=0.02) and summary["tokens"] == 500
    assert summary["by_task"] == {"count": {"1": 1, "2": 0}, "sum": {"1": 2, "2": 0}}
    assert summary["disagreeing"] == len(summary["disagreements"]) == 2
    assert sum(summary["confidence_histogram"]["counts"]) == 5
    assert (summary["votes_asked"], summary["votes_from_cache"], summary["votes_possible"]) == (3, 2, 8)
    assert summary["votes_per_second"] == 1.5
    shown = render(summary)
    assert "no question is labelled System 2" in shown and "teacher b was given up: 16 failures" in shown
    assert "3 of 8 votes asked for (62 % saved: 2 from the cache)" in shown
    json.dumps(summary, allow_nan=False)


def test_the_sample_of_disagreements_is_even_and_bounded() -> None:
    shown: Counter[str] = Counter()
    for seed in range(300):
        tally = Tally(panel("a", "b"), {}, seed)
        for i in range(20):
            answers = {"a": [answer(-1.0)], "b": [answer(1.0)]}
            tally.add(Row(str(i), f"q{i}", "1", "1", "t"), 1, [vote("a", 1), vote("b", 2)], answers)
        summary = tally.summary(0, Session())
        assert len(summary["disagreements"]) == 8 and summary["disagreeing"] == 20
        shown.update(entry["prompt"] for entry in summary["disagreements"])
    assert len(shown) == 20 and max(shown.values()) < 1.5 * min(shown.values())
