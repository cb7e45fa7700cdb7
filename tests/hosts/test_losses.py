"""In every stage a machine is lost, or cut off from the network for a while: the run ends as the undisturbed one."""

import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from tests.chaos import Recovery
from tests.e2e.twin import ends_as_its_twin, is_done
from tests.hosts.conftest import FarRun
from tests.hosts.machines import Machine
from tests.hosts.run import Sent
from tests.tiny_run import metrics, stored_votes, sums_in
from tests.waiting import wait_until

pytestmark = pytest.mark.hosts

NODE, CUT = "node", "network cut and healed"
CUT_S = 20
LIMIT_S = 600
"""For a stage's beginning, and for its end after the fault."""
BROKEN = {
    NODE: {"label": "engines", "score": "training", "sft": "training", "grpo": "engines", "evaluate": "engines"},
    CUT: {"label": "engines", "score": "training", "sft": "training", "grpo": "training", "evaluate": "engines"},
}
"""The machine that a stage loses; none is the driver's."""
PLACED = {"teachers.1.resources.nodes.group": "engines", "rows_per_block": 2, "concurrency": 2}
"""One teacher is not on the driver's machine, and votes are stored a few at a time."""


@pytest.mark.parametrize("fault", [NODE, CUT])
@pytest.mark.fault("label", "node", "network cut and healed")
@pytest.mark.fault("score", "node", "network cut and healed")
@pytest.mark.fault("sft", "node", "network cut and healed")
@pytest.mark.fault("grpo", "node", "network cut and healed")
@pytest.mark.fault("evaluate", "node", "network cut and healed")
def test_a_run_that_loses_machines_ends_as_one_that_does_not(
    far: FarRun, sent: Sent, chance: Random, recovery: Recovery, fault: str
) -> None:
    assert far.status == 0, far.output[-3000:]
    cluster, name = sent.cluster, fault.split()[0]
    run, restarts = sent.shared / "runs" / name, len(cluster.restarts)
    begun = under_way(run, chance.randint(1, 4))
    placed = [word for key, value in PLACED.items() for word in ("--set", f"label.{key}={value}")]
    job = sent.submit(f"runs/{name}", "--no-check", *placed)

    def wait_for(what: str, seen: Callable[[], bool]) -> None:
        def look() -> bool:
            assert job.poll() in (None, 0), job.communicate()[0][-3000:]
            return seen()

        wait_until(what, look, LIMIT_S, every_s=0.05)

    try:
        for stage, machine in BROKEN[fault].items():
            wait_for(f"{stage} has begun", begun[stage])
            with recovery(stage, fault):
                if fault == NODE:
                    cluster.kill_raylet(machine)
                    assert not is_done(run, stage)
                else:
                    cut_off(cluster.on[machine])
                wait_for(f"{stage} ends", lambda stage=stage: is_done(run, stage))
        output, _ = job.communicate(timeout=LIMIT_S)
    finally:
        job.kill()
    assert job.returncode == 0, output[-3000:]
    if fault == NODE:
        assert cluster.restarts[restarts:] == list(BROKEN[NODE].values())
    for stage in BROKEN[fault]:
        ends_as_its_twin(stage, run, far.run)
    ours, theirs = metrics(run, "grpo"), metrics(far.run, "grpo")
    assert [line["reward"] for line in ours] == [line["reward"] for line in theirs]
    trained, undisturbed = (load_file(each / "grpo/adapter/adapter_model.safetensors") for each in (run, far.run))
    for key, value in undisturbed.items():
        assert torch.equal(trained[key], value), key


def under_way(run: Path, steps: int) -> dict[str, Callable[[], bool]]:
    """By stage, whether it has done a part of its work; of training, so many steps."""
    return {
        "label": lambda: len(stored_votes(run)) >= 8 * steps,
        "score": lambda: bool(sums_in(run)),
        "sft": lambda: len(metrics(run, "sft")) >= steps,
        "grpo": lambda: len(metrics(run, "grpo")) >= steps,
        "evaluate": lambda: (run / "eval" / "base.json").is_file(),
    }


def cut_off(machine: Machine) -> None:
    """From the network; its processes go on."""
    machine.unplug()
    try:
        time.sleep(CUT_S)
    finally:
        machine.plug_in()
