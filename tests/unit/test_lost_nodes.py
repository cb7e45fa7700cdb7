"""Each stage says which of its processes have lost their nodes; the cluster is simulated, and the work is a wait."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from lorapar_ray import capacity
from lorapar_ray.capacity import Capacity
from lorapar_ray.config import Config
from lorapar_ray.datasets.prepare import prepare
from lorapar_ray.evaluation import job as evaluation
from lorapar_ray.grpo import job as grpo
from lorapar_ray.grpo import together
from lorapar_ray.labeling import job as labeling
from lorapar_ray.runs import RunDirectory


class Shrinking:
    """A cluster of 16 CPUs when a stage begins, and of 1 after that."""

    def __init__(self) -> None:
        self.looks, self.seen = 0, Event()

    def __call__(self) -> Capacity:
        self.looks += 1
        if self.looks > 4:
            self.seen.set()  # the smaller cluster has been seen, and what is said of it has been printed
        return Capacity({"CPU": 16.0 if self.looks <= 2 else 1.0})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Shrinking:
    cluster = Shrinking()
    monkeypatch.setattr(capacity, "capacity", cluster)
    monkeypatch.setattr(capacity, "LOOK_WHILE_WORKING_S", 0.001)
    return cluster


def config_of(**sections: Any) -> Config:
    tree = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"reader": "file", "path": "rows.jsonl"}]}}
    return Config.model_validate({**tree, **sections})


def test_labelling_watches_its_processes(
    cluster: Shrinking, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answer": "a"}\n')
    teacher = {"name": "t", "kind": "python", "model": "tests.cluster.faulty_teachers:FaultyTeacher"}
    label = {"teachers": [teacher], "quorum": 1, "workers": 3, "resources": {"cpus": 1}, "calibration": "none"}
    data = {"train": [{"reader": "file", "path": str(tmp_path / "rows.jsonl")}]}
    config, run = config_of(data=data, label=label), RunDirectory(tmp_path / "run")
    prepare(config, run)
    voting = labeling._Voting(config, run)
    monkeypatch.setattr(voting, "_ask", lambda: cluster.seen.wait(30))
    voting.collect()
    voting.store.close()
    said = " ".join(capsys.readouterr().out.split())
    assert "label waits for nodes: asks for 3 CPU (workers 3 × 1) but the cluster has 1; lower label.t" in said


@pytest.mark.parametrize("several", [False, True])
def test_stage_2_watches_all_of_its_processes(
    several: bool,
    cluster: Shrinking,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    config, run = config_of(grpo={"learners": 2, "reward_resources": {"cpus": 0.5}}), RunDirectory(tmp_path)
    job = SimpleNamespace(metrics=str(tmp_path / "grpo.jsonl"), steps=1, base="m", adapter_in="", payload=dict)
    stage = SimpleNamespace(
        config=config, run=run, job=job, plan={}, writes=[], notes={}, trained=False, finish=lambda: None
    )
    monkeypatch.setattr(grpo, "stage2", lambda *_: stage)
    monkeypatch.setattr(grpo, "_require_servable", lambda *_: None)
    monkeypatch.setattr(grpo, "staying_engines", lambda *_: [])
    monkeypatch.setattr(grpo, "run_learners", lambda *_: cluster.seen.wait(30))
    if several:
        together.train_together([(config, run)])
    else:
        grpo.train_stage2(config, run)
    said = " ".join(capsys.readouterr().out.split())
    asked = "rollout_actors 1 × 1, learners 2 × 1, reward_workers 1 × 0.5"
    assert f"grpo waits for nodes: asks for 3.5 CPU ({asked}) but the cluster has 1; lower grpo.rollout_actors" in said


def test_the_evaluation_watches_its_engines(
    cluster: Shrinking, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, run = config_of(evaluate={"engines": 2}), RunDirectory(tmp_path)
    part = SimpleNamespace(config=config, waits=True, prepare=lambda: None)
    monkeypatch.setattr(evaluation._Part, "of", lambda *_: part)
    monkeypatch.setattr(evaluation, "count_rows", lambda _: 1)
    monkeypatch.setattr(evaluation, "_answer_by_engines", lambda _: cluster.seen.wait(30))
    assert evaluation.evaluate_together([(config, run)]) == [{"n": 1}]
    said = " ".join(capsys.readouterr().out.split())
    assert "evaluate waits for nodes: asks for 2 CPU (engines 2 × 1) but the cluster has 1; lower evaluate.eng" in said
