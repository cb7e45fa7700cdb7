"""A training whose adapter is written takes no step again, whatever stops the command before the stage is recorded."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorapar_ray.errors import UserError
from lorapar_ray.grpo import together
from lorapar_ray.grpo.job import train_stage2
from lorapar_ray.perform import perform
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.arm import Worker
from lorapar_ray.sft.together import train_together
from tests.sft_run import ready_run, weights
from tests.tiny_run import metrics
from tests.together import tasks_here

torch.set_num_threads(1)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that groups of workers have run: in this process, instead of Ray's."""
    started: list[str] = []

    def here(work: Callable[[dict[str, Any]], None], payload: dict[str, Any], **_: Any) -> None:
        started.append(work.__name__)
        work(payload)

    for module in ("sft.job", "sft.together"):
        monkeypatch.setattr(f"lorapar_ray.{module}.run_workers", here)
    for module in ("worker", "arms_worker"):
        monkeypatch.setattr(f"lorapar_ray.sft.{module}.this_worker", lambda: Worker(0, 1, torch.device("cpu")))
    return started


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_full_at_done(run: RunDirectory, stage: str, /, _record: Any = RunDirectory.record, **entry: Any) -> None:
    if entry["status"] == "done":
        full_disk()
    _record(run, stage, **entry)


@pytest.mark.parametrize(
    ("init", "place", "fault"),
    [
        ("gaussian", "lorapar_ray.runs.RunDirectory.record", disk_full_at_done),
        ("pissa", "lorapar_ray.runs.RunDirectory.record", disk_full_at_done),
        ("pissa", "lorapar_ray.sft.job.export_plain", full_disk),
    ],
)
def test_stage_1_is_finished_without_a_step(
    init: str, place: str, fault: Any, groups: list[str], student: Path, tmp_path: Path
) -> None:
    config, run = ready_run(student, tmp_path, init=init, max_steps=3)
    stage, inputs = PIPELINE["sft"], {"settings": {}, "sources": {}, "files": {}}
    with tasks_here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, fault)
        with pytest.raises((OSError, UserError)):
            perform(stage, config, run, inputs, spent=0.0, aside=None)
    assert run.entry("sft")["status"] == "started" and len(metrics(run.root, "sft")) == 3
    written = run.sft / ("trained" if init == "pissa" else "adapter")
    before = weights(written)
    with tasks_here():
        perform(stage, config, run, inputs, spent=0.0, aside=None)
    assert groups == ["train_worker"] and run.entry("sft")["status"] == "done"
    assert all(torch.equal(before[key], value) for key, value in weights(written).items())
    assert (run.sft / "adapter").is_dir() and not (run.work / "sft" / "checkpoints").exists()


def test_runs_that_train_together_leave_out_those_that_have_trained(
    groups: list[str], student: Path, tmp_path: Path
) -> None:
    members = [ready_run(student, tmp_path / str(number), max_steps=2) for number in range(3)]
    with tasks_here():
        notes = train_together(members[:2])
        assert train_together(members[:2]) == notes and groups == ["train_arms_worker"]
        assert train_together(members)[:2] == notes and groups == ["train_arms_worker", "train_worker"]
    assert all(len(metrics(run.root, "sft")) == 2 for _, run in members)


@pytest.mark.parametrize("several", [False, True])
def test_stage_2_is_finished_without_a_step(
    several: bool, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("job", "together"):
        monkeypatch.setattr(f"lorapar_ray.grpo.{module}._train", lambda _: pytest.fail("it trains again"))
    config, run = ready_run(student, tmp_path)
    for folder in (run.sft, run.grpo):
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter_config.json").write_text('{"r": 4}')
    (run.work / "grpo" / "step-2").mkdir(parents=True)
    with tasks_here():
        [notes] = together.train_together([(config, run)]) if several else [train_stage2(config, run)]
    assert notes["steps"] == config.grpo.steps and not (run.work / "grpo").exists()
