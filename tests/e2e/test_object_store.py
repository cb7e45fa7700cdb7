"""The pipeline on a run directory in an object store: killed in stage 2, and gone on with from an empty disk."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from lorapar_ray.datasets.rows import read_table
from lorapar_ray.files import cache_root
from lorapar_ray.runs import looked_at
from lorapar_ray.storage.mirror import Mirror
from lorapar_ray.storage.objects import Objects
from lorapar_ray.storage.uris import Uri
from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_interruption import copy_before, stop_when
from tests.object_store import object_store
from tests.tiny_run import GRPO_STEPS, lorapar, lorapar_here, metrics

pytestmark = pytest.mark.e2e


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Uri]:
    with object_store() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield Uri("s3", "bucket", "runs/tiny")


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is another machine: its disk has the unpacked model and nothing else."""
    models = cache_root() / "models"
    folder.mkdir()
    (folder / "models").symlink_to(models)
    monkeypatch.setenv("LORAPAR_CACHE", str(folder))


@pytest.mark.chaos("grpo", "driver, other machine")
def test_a_run_killed_on_one_machine_ends_on_another_as_one_on_a_disk(
    chance: Random,
    thorough: bool,
    recovery: Recovery,
    finished: FinishedRun,
    s3: Uri,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--chaos all` begins with nothing and goes to the end; else it is stage 2 alone."""
    if not thorough:
        Mirror(copy_before(finished, "grpo", tmp_path / "tuned"), Objects(s3)).push()
    arguments = (*(("run", finished.config) if thorough else ("grpo", "-c", finished.config)), "-d", str(s3))
    machine(tmp_path / "first", monkeypatch)
    objects, wanted = Objects(s3), f"work/grpo/step-{chance.randint(1, GRPO_STEPS - 4):07d}.safetensors"
    stop_when(lambda: any(name >= wanted for name in objects.listing("work/grpo")), signal.SIGKILL, *arguments)
    [mirror] = (tmp_path / "first" / "runs").iterdir()
    before = metrics(mirror, "grpo")
    kept = max(int(name[-len("0000000.safetensors") :].split(".")[0]) for name in objects.listing("work/grpo"))
    machine(tmp_path / "second", monkeypatch)
    with recovery("grpo", "driver, other machine"):
        again = lorapar(*arguments, timeout=500)
    assert again.returncode == 0, again.stderr
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert secret not in (again.stdout + again.stderr).encode()
    with looked_at(str(s3)) as run:
        assert not [each for each in run.root.rglob("*") if each.is_file() and secret in each.read_bytes()]
        for place in ("scores/system1", "scores/system2", "partition/regions", "sft/adapter/adapter_model"):
            ours, theirs = (load_file(root / f"{place}.safetensors") for root in (run.root, finished.run))
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-7)
        lines = metrics(run.root, "grpo")
        assert [line["policy_version"] for line in lines] == list(range(1, GRPO_STEPS + 1))
        kept = min(kept, len(before))  # what comes after the newest checkpoint is done again
        assert lines[:kept] == before[:kept]
        prompts = [prompt for line in lines for prompt in line["prompts"]]
        assert len(set(prompts)) == len(prompts)
        labels = [
            {row["id"]: row["system"] for row in read_table(root / "labels")} for root in (run.root, finished.run)
        ]
        assert labels[0] == labels[1]
        stages = json.loads((run.root / "manifest.json").read_text())["stages"]
        assert {each["status"] for each in stages.values()} == {"done"}
        assert (run.report / "index.html").is_file() == thorough
    taken = lorapar_here("export", "-d", s3, "--stage", "sft", "-o", tmp_path / "taken")
    assert taken.returncode == 0, taken.stderr
    assert (tmp_path / "taken" / "adapter_model.safetensors").is_file()
    shown = lorapar_here("status", "-d", s3).stdout
    assert f"{s3} · no command is running" in shown and "✓ grpo" in shown
    assert not [name for name in objects.listing() if name.startswith(("work/grpo", "work/ray", "lock/"))]
