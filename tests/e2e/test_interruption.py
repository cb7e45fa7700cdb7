"""`kill -9` or Ctrl-C in the middle of a stage: the same command goes on and ends where an undisturbed run does."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from lorapar_ray.runs import STAGES
from tests.e2e.conftest import FinishedRun
from tests.tiny_run import ROOT, command, lorapar, metrics

pytestmark = pytest.mark.e2e
OUTPUTS = {
    "label": ("data", "labels", "rejects", "work/label"),
    "score": ("scores", "adapter", "work/score", "work/warmup"),
    "sft": ("sft",),
    "grpo": ("grpo",),
}


def copy_before(finished: FinishedRun, stage: str, target: Path) -> Path:
    """A copy of the finished run in which `stage` and everything after it has not happened."""
    shutil.copytree(finished.run, target)
    manifest = json.loads((target / "manifest.json").read_text())
    for name in STAGES[STAGES.index(stage) :]:
        manifest["stages"].pop(name, None)
    (target / "manifest.json").write_text(json.dumps(manifest))
    for folder in OUTPUTS[stage]:
        shutil.rmtree(target / folder, ignore_errors=True)
    (target / "metrics" / f"{stage}.jsonl").unlink(missing_ok=True)
    return target


def stop_when(condition: Callable[[], bool], sent: signal.Signals, *arguments: str | Path) -> tuple[int, str]:
    """Start the CLI, send it and its children a signal as soon as `condition` holds; returns (status, stderr)."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    pause, deadline = threading.Event(), time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the stage ended before it could be killed"
        assert time.monotonic() < deadline, "the stage never got that far"
        pause.wait(0.1)
    os.killpg(process.pid, sent)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def test_questions_voted_on_are_not_asked_again(finished: FinishedRun, tmp_path: Path) -> None:
    run = copy_before(finished, "label", tmp_path / "run")
    command_line = ("label", "-c", finished.config, "-d", run, "--set", "label.rows_per_block=2")
    blocks = run / "work" / "label"
    stop_when(lambda: any(blocks.glob("*.votes.json")), signal.SIGKILL, *command_line)
    there = {path: path.stat().st_mtime_ns for path in blocks.glob("*.votes.json")}
    again = lorapar(*command_line)
    assert again.returncode == 0, again.stderr
    assert len(there) < len(list(blocks.glob("*.votes.json")))
    assert there == {path: path.stat().st_mtime_ns for path in there}
    labelled = [pq.read_table(path).column("id").to_pylist() for path in (run / "labels").glob("*.parquet")]
    asked = pq.read_table(run / "data" / "train.parquet").column("id").to_pylist()
    assert sorted(chain.from_iterable(labelled)) == sorted(asked)


def test_scoring_goes_on_with_the_units_that_are_there(finished: FinishedRun, tmp_path: Path) -> None:
    run = copy_before(finished, "score", tmp_path / "run")
    units = run / "work" / "score"
    stop_when(lambda: any(units.glob("*/*.safetensors")), signal.SIGKILL, "score", "-c", finished.config, "-d", run)
    there = {path: path.stat().st_mtime_ns for path in units.glob("*/*.safetensors")}
    again = lorapar("score", "-c", finished.config, "-d", run)
    assert again.returncode == 0, again.stderr
    assert there == {path: path.stat().st_mtime_ns for path in there}
    for system in (1, 2):
        ours, theirs = (load_file(folder / "scores" / f"system{system}.safetensors") for folder in (run, finished.run))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_sft_ends_in_the_same_adapter(sent: signal.Signals, finished: FinishedRun, tmp_path: Path) -> None:
    run = copy_before(finished, "sft", tmp_path / "run")
    status, errors = stop_when(lambda: len(metrics(run, "sft")) >= 3, sent, "sft", "-c", finished.config, "-d", run)
    if sent == signal.SIGINT:
        assert status == 130, errors
        assert errors.splitlines()[-1] == "lorapar: interrupted; the same command continues where it stopped"
    again = lorapar("sft", "-c", finished.config, "-d", run)
    assert again.returncode == 0, again.stderr
    steps = [line["step"] for line in metrics(run, "sft")]
    assert steps == list(range(1, len(steps) + 1))
    ours, theirs = weights(run / "sft" / "adapter"), weights(finished.run / "sft" / "adapter")
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-7)


def test_a_policy_that_cannot_be_proved_stops_the_run(finished: FinishedRun, tmp_path: Path) -> None:
    run = copy_before(finished, "grpo", tmp_path / "run")
    stopped = lorapar("grpo", "-c", finished.config, "-d", run, "--set", "grpo.canary_tolerance=1e-12")
    assert stopped.returncode == 2, stopped.stderr
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("lorapar:")]
    assert "does not serve policy 0" in line and "canary" in line
    assert metrics(run, "grpo") == []


def test_grpo_goes_on_from_its_checkpoint(finished: FinishedRun, tmp_path: Path) -> None:
    run = copy_before(finished, "grpo", tmp_path / "run")
    stop_when(lambda: len(metrics(run, "grpo")) >= 2, signal.SIGKILL, "grpo", "-c", finished.config, "-d", run)
    again = lorapar("grpo", "-c", finished.config, "-d", run)
    assert again.returncode == 0, again.stderr
    assert [line["policy_version"] for line in metrics(run, "grpo")] == [1, 2, 3, 4]
    ours, theirs = weights(run / "grpo" / "adapter"), weights(finished.run / "grpo" / "adapter")
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[key], weights(run / "sft" / "adapter")[key]) for key in ours)
