"""`kill -9` in the middle of a stage: the same command goes on and ends where an undisturbed run does."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorapar_ray.runs import STAGES
from tests.e2e.conftest import FinishedRun
from tests.tiny_run import ROOT, command, lorapar, metrics

pytestmark = pytest.mark.e2e
OUTPUTS = {"score": ("scores", "adapter", "work/score", "work/warmup"), "sft": ("sft",), "grpo": ("grpo",)}


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


def kill_when(condition: Callable[[], bool], *arguments: str | Path) -> None:
    """Start the CLI and `kill -9` it, and everything it started, as soon as `condition` holds."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pause, deadline = threading.Event(), time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the stage ended before it could be killed"
        assert time.monotonic() < deadline, "the stage never got that far"
        pause.wait(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def test_scoring_goes_on_with_the_units_that_are_there(finished: FinishedRun, tmp_path: Path) -> None:
    run = copy_before(finished, "score", tmp_path / "run")
    units = run / "work" / "score"
    kill_when(lambda: any(units.glob("*/*.safetensors")), "score", "-c", finished.config, "-d", run)
    there = {path: path.stat().st_mtime_ns for path in units.glob("*/*.safetensors")}
    again = lorapar("score", "-c", finished.config, "-d", run)
    assert again.returncode == 0, again.stderr
    assert there == {path: path.stat().st_mtime_ns for path in there}
    for system in (1, 2):
        ours, theirs = (load_file(folder / "scores" / f"system{system}.safetensors") for folder in (run, finished.run))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-9)


def test_sft_ends_in_the_same_adapter(finished: FinishedRun, tmp_path: Path) -> None:
    run = copy_before(finished, "sft", tmp_path / "run")
    kill_when(lambda: len(metrics(run, "sft")) >= 3, "sft", "-c", finished.config, "-d", run)
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
    kill_when(lambda: len(metrics(run, "grpo")) >= 2, "grpo", "-c", finished.config, "-d", run)
    again = lorapar("grpo", "-c", finished.config, "-d", run)
    assert again.returncode == 0, again.stderr
    assert [line["policy_version"] for line in metrics(run, "grpo")] == [1, 2, 3, 4]
    ours, theirs = weights(run / "grpo" / "adapter"), weights(finished.run / "grpo" / "adapter")
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[key], weights(run / "sft" / "adapter")[key]) for key in ours)
