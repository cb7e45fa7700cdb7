"""Scores do not depend on the number of workers, a sharded base, or a killed worker."""

import shutil
import threading
from collections.abc import Sequence
from functools import partial
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
from tests.chaos import Recovery
from tests.tiny_run import save_tiny_student, tiny_config
from tests.together import run_together

pytestmark = pytest.mark.cluster
Scores = dict[str, torch.Tensor]


def make_run(student: Path, folder: Path, **score: Any) -> tuple[Config, RunDirectory]:
    """A labelled run with an adapter, and a function that scores it."""
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
    """A run scored by one worker without faults."""
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


CUT = {"workers": 2, "sharding": "fsdp2"}
THREE = {"workers": 3, "resources": {"cpus": 0.5}}


def scored(runs: Sequence[tuple[Config, RunDirectory]]) -> list[RunDirectory]:
    run_together("lorapar_ray.importance.job", [partial(score_stage, *each) for each in runs])
    return [run for _, run in runs]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_cut_base_changes_nothing(checkpointing: bool, cut: dict[bool, RunDirectory], alone: list[Scores]) -> None:
    same(scores_of(cut[checkpointing]), alone)
    require_halves(cut[checkpointing])


@pytest.fixture(scope="module")
def cut(cluster: None, student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, RunDirectory]:
    """The base cut over two workers, without and with gradient checkpointing."""
    root = tmp_path_factory.mktemp("cut")
    how = (False, True)
    runs = [make_run(student, root / str(each), **CUT, gradient_checkpointing=each) for each in how]
    return dict(zip(how, scored(runs), strict=True))


def require_halves(run: RunDirectory) -> None:
    assert [halves.examples for halves in load_halves(run.scores / "halves")] == [(6, 6), (12, 12), (13, 13)]


def test_other_numbers_of_workers_change_nothing_from_the_beginning_or_on_the_way(
    finished: RunDirectory, alone: list[Scores], student: Path, tmp_path: Path
) -> None:
    whole, (config, run) = make_run(student, tmp_path / "whole", **THREE), make_run(student, tmp_path / "run", **THREE)
    shutil.copytree(finished.work / "score", run.work / "score")
    kept, lost = sums_in(run)[::2], sums_in(run)[1::2]
    written = {file: file.stat().st_mtime_ns for file in kept}
    for file in lost:
        file.unlink()
    for each in scored([whole, (config, run)]):
        same(scores_of(each), alone)
        require_halves(each)
    assert len(sums_in(run)) > len(kept) and written == {file: file.stat().st_mtime_ns for file in kept}


@pytest.mark.chaos("score", "worker")
def test_a_killed_worker_is_replaced_and_counts_nothing_twice(
    chance: Random, recovery: Recovery, alone: list[Scores], student: Path, tmp_path: Path
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
        with recovery("score", "worker"):
            while len(sums_in(run)) <= len(done):
                pause.wait(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    score_stage(config, run)
    killer.join()
    assert killed and set(killed) < set(sums_in(run))
    same(scores_of(run), alone)
