"""Scores do not depend on the number of workers, a sharded base, or a killed worker."""

import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorapar_ray.adapters.job import make_adapter
from lorapar_ray.config import Config
from lorapar_ray.datasets.labelled import token_table
from lorapar_ray.datasets.tokens import key_of
from lorapar_ray.files import digest
from lorapar_ray.importance import job
from lorapar_ray.importance.halves import load_halves
from lorapar_ray.importance.job import score_stage
from lorapar_ray.importance.parts import UNIT_SIZE
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory
from tests.chaos import Recovery
from tests.processes import a_worker_dies
from tests.tiny_run import sums_in, tiny_config
from tests.together import run_together, tasks_here

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
    with tasks_here():
        make_adapter(config, run, run.adapter)
        token_table(config, run)
    return config, run


def scores_of(run: RunDirectory) -> list[Scores]:
    return [load_file(run.scores / f"system{system}.safetensors") for system in (1, 2)]


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


TWO = {"workers": 2, "resources": {"cpus": 0.5}}
CUT = {**TWO, "sharding": "fsdp2"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "two workers": TWO,
    "a cut base": CUT,
    "a cut base with checkpointing": {**CUT, "gradient_checkpointing": True},
}


@dataclass
class Rest:
    """What two workers, told to use larger units, made of the run that one had half done."""

    run: RunDirectory
    kept: dict[Path, int]
    """The one's sums, and when each was written."""


@dataclass
class ByTwo:
    """What two workers scored, in one group."""

    layouts: dict[str, RunDirectory]
    rest: Rest


@pytest.fixture(scope="module")
def by_two(finished: RunDirectory, student: Path, tmp_path_factory: pytest.TempPathFactory) -> ByTwo:
    root = tmp_path_factory.mktemp("by_two")
    runs = {name: make_run(student, root / name, **how) for name, how in LAYOUTS.items()}
    config, run = make_run(student, root / "rest", **TWO, unit_size=5)
    shutil.copytree(finished.work / "score", run.work / "score")
    kept, lost = sums_in(run.root)[::2], sums_in(run.root)[1::2]
    for file in lost:
        file.unlink()
    rest = Rest(run, {file: file.stat().st_mtime_ns for file in kept})
    stages = [partial(score_stage, *each) for each in (*runs.values(), (config, run))]
    run_together(["lorapar_ray.importance.job"], stages)
    return ByTwo({name: run for name, (_, run) in runs.items()}, rest)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(layout: str, by_two: ByTwo, alone: list[Scores]) -> None:
    same(scores_of(by_two.layouts[layout]), alone)
    require_halves(by_two.layouts[layout])


def test_sums_that_an_earlier_version_began_are_continued(
    finished: RunDirectory, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the size of a unit in the folder's key, and no record of it."""
    config, run = make_run(student, tmp_path / "run")
    tokens = token_table(config, run)
    samples = {str(system): {**asdict(each), "path": ""} for system, each in job.samples_of(config, tokens).items()}
    [sums] = (finished.work / "score").glob("sums-*")
    folder = run.work / "score" / f"sums-{digest([key_of(tokens), samples, 3])[:12]}"
    shutil.copytree(sums, folder)
    (folder / UNIT_SIZE).unlink()
    monkeypatch.setattr(job, "run_workers", None)  # every unit is done
    with tasks_here():
        score_stage(config, run)
    assert list((run.work / "score").glob("sums-*")) == [folder]
    same(scores_of(run), scores_of(finished))


def require_halves(run: RunDirectory) -> None:
    assert [halves.examples for halves in load_halves(run.scores / "halves")] == [(6, 6), (12, 12), (13, 13)]


def test_other_workers_and_units_go_on_with_what_is_done(by_two: ByTwo, alone: list[Scores]) -> None:
    rest = by_two.rest
    same(scores_of(rest.run), alone)
    require_halves(rest.run)
    assert len(sums_in(rest.run.root)) > len(rest.kept)
    assert rest.kept == {file: file.stat().st_mtime_ns for file in rest.kept}


@pytest.mark.chaos("score", "worker")
def test_a_killed_worker_is_replaced_and_counts_nothing_twice(
    chance: Random, recovery: Recovery, alone: list[Scores], student: Path, tmp_path: Path
) -> None:
    config, run = make_run(student, tmp_path / "run", workers=2, batch_tokens=32, unit_size=1, checkpoint_every_s=0)
    with a_worker_dies("score", 1, lambda: sums_in(run.root), chance, recovery) as before:
        score_stage(config, run)
    assert before and set(before) < set(sums_in(run.root))
    same(scores_of(run), alone)
