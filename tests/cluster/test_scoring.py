"""Scores do not depend on who computed them: other numbers of workers, a base in pieces, a worker that is killed."""

import shutil
import threading
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lorapar_ray.adapters.job import make_adapter
from lorapar_ray.config import Config
from lorapar_ray.importance.halves import load_halves
from lorapar_ray.importance.job import score_stage
from lorapar_ray.pipeline import run_stage
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import save_tiny_student, tiny_config

pytestmark = pytest.mark.cluster
Scores = dict[str, torch.Tensor]


def make_run(student: Path, folder: Path, **score: Any) -> tuple[Config, RunDirectory]:
    """A labelled run with an adapter to score, and how to."""
    settings = {"examples_per_system": 13, "batch_tokens": 128, "unit_size": 3, "max_length": 128, **score}
    plain = tiny_config(student)
    plain |= {
        "label": {"strategy": "random"},
        "adapter": {"rank": 4, "alpha": 8, "init": "gaussian"},
        "score": settings,
    }
    config, run = Config.model_validate(plain), RunDirectory(folder)
    run.open(config)
    run_stage(config, run, "label")
    make_adapter(config, run, run.adapter)
    return config, run


def sums_in(run: RunDirectory) -> list[Path]:
    return sorted((run.work / "score").glob("sums-*/*/*.safetensors"))


def scores_of(run: RunDirectory) -> list[Scores]:
    return [load_file(run.scores / f"system{system}.safetensors") for system in (1, 2)]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def finished(cluster: None, student: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that one undisturbed worker scored."""
    config, run = make_run(student, tmp_path_factory.mktemp("alone"))
    score_stage(config, run)
    return run


@pytest.fixture
def alone(finished: RunDirectory) -> list[Scores]:
    """Its scores."""
    return scores_of(finished)


def same(ours: list[Scores], theirs: list[Scores]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "score",
    [
        {"workers": 3, "resources": {"cpus": 0.5}},
        {"workers": 2, "sharding": "fsdp2"},
        {"workers": 2, "sharding": "fsdp2", "gradient_checkpointing": True},
    ],
)
def test_workers_and_sharding_change_nothing(
    alone: list[Scores], student: Path, tmp_path: Path, score: dict[str, Any]
) -> None:
    config, run = make_run(student, tmp_path / "run", **score)
    score_stage(config, run)
    same(scores_of(run), alone)
    assert [halves.examples for halves in load_halves(run.scores / "halves")] == [(6, 6), (12, 12), (13, 13)]


def test_a_run_resumed_on_another_number_of_workers_gives_the_same_scores(
    finished: RunDirectory, alone: list[Scores], student: Path, tmp_path: Path
) -> None:
    config, run = make_run(student, tmp_path / "run", workers=3, resources={"cpus": 0.5})
    shutil.copytree(finished.work / "score", run.work / "score")
    kept, lost = sums_in(run)[::2], sums_in(run)[1::2]
    written = {file: file.stat().st_mtime_ns for file in kept}
    for file in lost:
        file.unlink()
    score_stage(config, run)
    assert len(sums_in(run)) > len(kept) and written == {file: file.stat().st_mtime_ns for file in kept}
    same(scores_of(run), alone)


@pytest.mark.chaos("score")
def test_a_killed_worker_is_replaced_and_counts_nothing_twice(
    chance: Random, alone: list[Scores], student: Path, tmp_path: Path
) -> None:
    config, run = make_run(student, tmp_path / "run", workers=2, batch_tokens=32, unit_size=1, checkpoint_every_s=0)
    killed: list[Path] = []

    def kill_one() -> None:
        pause = threading.Event()
        while not (done := sums_in(run)):
            pause.wait(0.02)
        ours = psutil.Process().children(recursive=True)
        worker = chance.choice([each for each in ours if "RayTrainWorker" in " ".join(each.cmdline())])
        killed.extend(done)
        worker.kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    score_stage(config, run)
    killer.join()
    assert killed and set(killed) < set(sums_in(run))
    same(scores_of(run), alone)
