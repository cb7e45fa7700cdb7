"""The whole pipeline on three machines: teachers on one, engines on another, two learners on two. A fourth machine,
which sees neither their disks nor their shared folder, submits it."""

import json
from collections.abc import Mapping

import pytest

from lorapar_ray.pipeline import STAGES
from tests.hosts.conftest import FarRun
from tests.hosts.machines import WRITTEN
from tests.hosts.run import STEPS, Sent
from tests.tiny_run import metrics

pytestmark = pytest.mark.hosts


KEPT = ("safetensors", "parquet", "arrow", "sqlite", "jsonl")
"""Kinds of files of a run."""


def machines_of(what: str, titles: Mapping[str, set[str]]) -> set[str]:
    """The machines on which a kind of Ray process ran."""
    return {name for name, seen in titles.items() if any(title.startswith(f"ray::{what}") for title in seen)}


def test_every_part_runs_where_it_should(far: FarRun) -> None:
    assert far.status == 0, far.output[-3000:]
    stages = json.loads((far.run / "manifest.json").read_text())["stages"]
    assert {name: stages[name]["status"] for name in STAGES} == dict.fromkeys(STAGES, "done")
    assert [line["policy_version"] for line in metrics(far.run, "grpo")] == list(range(1, STEPS + 1))
    assert all(line["reward_failures"] == 0 for line in metrics(far.run, "grpo"))
    assert machines_of("ServeReplica:lorapar-tiny-a", far.titles) == {"head"}
    assert machines_of("ServeReplica:lorapar-tiny-b", far.titles) == {"head"}
    assert machines_of("RayTrainWorker", far.titles) == {"head", "training"}
    assert machines_of("EngineActor", far.titles) == {"engines"}
    assert machines_of("Coordinator", far.titles) == machines_of("Decoder", far.titles) == {"head"}  # the driver's


def test_nothing_of_the_run_is_left_on_a_machine_s_own_disk(far: FarRun, sent: Sent) -> None:
    """Nor on the client's: all files of a run are in its directory."""
    assert far.status == 0, far.output[-3000:]
    kept = [word for suffix in KEPT for word in ("-o", "-name", f"*.{suffix}")][1:]
    for name, machine in sent.cluster.on.items():
        status, found = machine.run(["find", WRITTEN, "/tmp", "/dev/shm", "(", *kept, ")"], {})
        assert (status, found) == (0, ""), name
    assert sorted(each.name for each in sent.folder.iterdir()) == ["my_rewards.py", "run.yaml"]


def test_the_token_is_nowhere(far: FarRun, sent: Sent) -> None:
    assert sent.cluster.token not in far.output
    for file in far.run.rglob("*"):
        if file.is_file():
            assert sent.cluster.token.encode() not in file.read_bytes(), file
