"""Machines are lost in the middle of a run, and it ends as the undisturbed one does."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorapar_ray.pipeline import STAGES
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_interruption import copy_before
from tests.hosts.conftest import FarRun
from tests.hosts.machines import wait_until
from tests.hosts.run import STEPS, Sent
from tests.tiny_run import metrics

pytestmark = pytest.mark.hosts

CUT_S = 20


def again_from(stage: str, far: FarRun, target: Path) -> Path:
    """A copy of the run in which `stage` and what comes after it has not happened."""
    run = copy_before(FinishedRun(Path(), Path(), far.run, 0, ""), stage, target)
    for name in STAGES[STAGES.index(stage) :]:
        (run / "metrics" / f"{name}.jsonl").unlink(missing_ok=True)
    return run


@pytest.mark.fault("score", "node")
@pytest.mark.fault("grpo", "node", "network cut and healed")
def test_a_run_that_loses_machines_ends_as_one_that_does_not(far: FarRun, sent: Sent) -> None:
    """A learner's dies while scoring and is cut off from the network in stage 2; then the one with the engine dies."""
    assert far.status == 0, far.output[-3000:]
    cluster = sent.cluster
    run = again_from("score", far, sent.shared / "runs" / "losses")
    job = sent.submit("runs/losses", "--no-check")

    def steps(count: int) -> bool:
        assert job.poll() is None, job.communicate()[0][-3000:]
        return len(metrics(run, "grpo")) >= count

    try:
        units = run / "work" / "score"
        wait_until("the first unit is scored", lambda: any(units.glob("sums-*/*/*.safetensors")), 300)
        cluster.kill_raylet("training")
        wait_until("two steps of stage 2", lambda: steps(2), 600)
        cluster.on["training"].unplug()
        time.sleep(CUT_S)
        cluster.on["training"].plug_in()
        wait_until("two more", lambda: steps(4), 300)
        cluster.kill_raylet("engines")
        output, _ = job.communicate(timeout=600)
    finally:
        cluster.on["training"].plug_in()
        job.kill()
    assert job.returncode == 0, output[-3000:]
    assert cluster.restarts == ["training", "engines"]
    for system in (1, 2):
        ours, theirs = (load_file(each / "scores" / f"system{system}.safetensors") for each in (run, far.run))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-9)
    lines, undisturbed = metrics(run, "grpo"), metrics(far.run, "grpo")
    assert [line["policy_version"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["prompts"] for line in lines] == [line["prompts"] for line in undisturbed]
    assert [line["reward"] for line in lines] == [line["reward"] for line in undisturbed]
    for stage in ("sft", "grpo"):
        ours, theirs = (load_file(each / stage / "adapter" / "adapter_model.safetensors") for each in (run, far.run))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)
