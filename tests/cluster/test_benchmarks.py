"""Benchmarks run rarely, but against interfaces that change often: their parts, at the smallest size."""

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from ray import cloudpickle

from tests.tiny_run import ROOT

pytestmark = pytest.mark.cluster


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a benchmark's modules; Ray's workers get them by value."""
    monkeypatch.syspath_prepend(str(ROOT / "jobs" / "benchmarks"))
    before, sent = set(sys.modules), []

    def load(name: str, *parts: str) -> Any:
        for each in (name, *parts):
            sent.append(import_module(each))
            cloudpickle.register_pickle_by_value(sent[-1])
        return import_module(name)

    yield load
    for module in sent:
        cloudpickle.unregister_pickle_by_value(module)
    for each in set(sys.modules) - before:
        if str(ROOT / "jobs") in str(getattr(sys.modules[each], "__file__", "")):
            del sys.modules[each]


def test_the_simulated_cluster_makes_steps(cluster: None, benchmark: Any) -> None:
    scale = benchmark("rollout_scale", "_simulated_cluster")
    load = scale.Load(slots=4, median_s=0.0, mean_tokens=64)
    marks = scale.run(engines=2, prompts=4, staleness=1, steps=3, load=load, training=0.0)
    assert [mark.prompts for mark in marks] == [4, 4, 4]
    assert marks[-1].busy_s > marks[0].busy_s > 0


def test_a_learners_pass_is_compared_with_a_plain_one(benchmark: Any) -> None:
    learner, device = benchmark("learner"), torch.device("cpu")
    model = learner.model_of("smollm2-135m", device, torch.float32, layers=1)
    for _ in range(2):  # each comparison begins with the model that the one before has left
        rows = learner.compare(model, 8, 16, 2, device, repeats=1)
        assert all(row.ours > 0 and row.peer > 0 for row in rows[:1])
