"""`kill -9` or Ctrl-C during a stage: the same command resumes, and its results equal those of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from lorapar_ray.datasets.rows import read_table
from lorapar_ray.pipeline import PIPELINE, STAGES
from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.twin import ends_as_its_twin
from tests.processes import below, engines_of
from tests.sft_run import weights
from tests.tiny_run import (
    ROOT,
    command,
    lorapar,
    metrics,
    save_tiny_student,
    stored_votes,
    sums_in,
    tiny_config,
    write_config,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e


def copy_before(finished: FinishedRun, stage: str, target: Path) -> Path:
    """A copy of the finished run without `stage` and all later stages."""
    shutil.copytree(finished.run, target)
    manifest = json.loads((target / "manifest.json").read_text())
    for name in STAGES[STAGES.index(stage) :]:
        manifest["stages"].pop(name, None)
        for folder in (*PIPELINE[name].outputs, *PIPELINE[name].scratch):
            shutil.rmtree(target / folder, ignore_errors=True)
    (target / "manifest.json").write_text(json.dumps(manifest))
    (target / "metrics" / f"{stage}.jsonl").unlink(missing_ok=True)
    return target


def stop_when(condition: Callable[[], bool], sent: signal.Signals, *arguments: str | Path) -> tuple[int, str]:
    """Start the CLI, send it and its children a signal as soon as `condition` holds; returns (status, stderr)."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until("the stage has got that far", condition, 600, every_s=0.1, alive=lambda: process.poll() is None)
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    os.killpg(process.pid, sent)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@pytest.mark.chaos("label", "Serve replica", "engine child")
def test_labelling_survives_kill_9_on_a_replica_and_on_an_engine(
    chance: Random, recovery: Recovery, tmp_path: Path
) -> None:
    votes = chance.randint(8, 30)
    config = write_config(tmp_path / "tiny.yaml", tiny_config(save_tiny_student(tmp_path / "student")))
    run, twin = tmp_path / "run", tmp_path / "twin"
    changes = {"calibration": "content_free", "rows_per_block": 2, "concurrency": 2, "teachers.1.thinking_tokens": 4}
    changed = [item for key, value in changes.items() for item in ("--set", f"label.{key}={value}")]
    undisturbed = lorapar("label", "-c", config, "-d", twin, *changed)
    assert undisturbed.returncode == 0, undisturbed.stderr
    process = subprocess.Popen(
        command("label", "-c", config, "-d", run, *changed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )

    def enough() -> bool:
        return len(stored_votes(run)) > votes

    wait_until("votes are stored", enough, 600, every_s=0.1, alive=lambda: process.poll() is None)
    before = stored_votes(run)
    [replica] = below("^ray::ServeReplica:lorapar-tiny-a:a", process.pid)
    replica.kill()
    (engine,) = engines_of(process.pid, "ray::ServeReplica:lorapar-tiny-b:b")
    engine.kill()
    assert len(before) < len(stored_votes(twin)), "labelling was over before anything could be killed"
    with recovery("label", "Serve replica", "until the end"), recovery("label", "engine child", "until the end"):
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    after = stored_votes(run)
    assert all(after[key] == seconds for key, seconds in before.items()), "a stored vote was asked for again"
    rows = read_table(run / "labels")
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in read_table(run / "data" / "train.parquet"))
    assert all([vote["teacher"] for vote in row["votes"]] == ["a", "b"] for row in rows)
    ends_as_its_twin("label", run, twin)


@pytest.mark.chaos("score", "driver")
def test_scoring_goes_on_with_the_units_that_are_there(
    chaos_round: int, recovery: Recovery, finished: FinishedRun, tmp_path: Path
) -> None:
    run = copy_before(finished, "score", tmp_path / "run")
    stop_when(lambda: bool(sums_in(run)), signal.SIGKILL, "score", "-c", finished.config, "-d", run)
    there = {path: path.stat().st_mtime_ns for path in sums_in(run)}
    with recovery("score", "driver"):
        again = lorapar("score", "-c", finished.config, "-d", run)
    assert again.returncode == 0, again.stderr
    assert there == {path: path.stat().st_mtime_ns for path in there}
    for system in (1, 2):
        ours, theirs = (load_file(folder / "scores" / f"system{system}.safetensors") for folder in (run, finished.run))
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), key


@pytest.mark.chaos("sft", "driver")
def test_sft_stopped_twice_ends_in_the_same_adapter(
    chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path
) -> None:
    first = chance.randint(1, 4)
    second = chance.randint(first + 2, first + 4)
    run = copy_before(finished, "sft", tmp_path / "run")
    arguments = ("sft", "-c", finished.config, "-d", run)
    status, errors = stop_when(lambda: len(metrics(run, "sft")) >= first, signal.SIGINT, *arguments)
    assert status == 130, errors
    assert errors.splitlines()[-1] == "lorapar: interrupted; the same command continues where it stopped"
    stop_when(lambda: len(metrics(run, "sft")) >= second, signal.SIGKILL, *arguments)
    with recovery("sft", "driver"):
        again = lorapar(*arguments)
    assert again.returncode == 0, again.stderr
    steps = [line["step"] for line in metrics(run, "sft")]
    assert steps == list(range(1, len(steps) + 1))
    ours, theirs = weights(run / "sft" / "adapter"), weights(finished.run / "sft" / "adapter")
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
