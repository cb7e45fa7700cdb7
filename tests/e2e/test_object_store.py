"""The pipeline on a run directory in an object store: killed in every stage, each time another machine goes on."""

import json
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest

from lorapar_ray.files import cache_root
from lorapar_ray.pipeline import STAGES
from lorapar_ray.runs import looked_at
from lorapar_ray.storage.objects import Objects
from lorapar_ray.storage.uris import Uri
from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_interruption import stop_when
from tests.e2e.twin import ends_as_its_twin
from tests.object_store import BUCKET, KEYS, SCHEMES, object_store
from tests.tiny_run import GRPO_STEPS, lorapar, lorapar_here, metrics

pytestmark = pytest.mark.e2e
KILLED = ("label", "score", "sft", "grpo", "evaluate")
OTHER = "driver, other machine"
FOLDERS = {"label": "votes"}
"""Of a stage's unfinished work, if it is not called after the stage."""
SLOWLY = ("--set", "label.rows_per_block=2", "--set", "label.concurrency=2")
"""So that votes are in the store before all have been given."""


@pytest.fixture(params=SCHEMES)
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Uri]:
    with object_store(request.param) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield Uri(request.param, BUCKET, "runs/tiny")


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is another machine: its disk has the unpacked model and nothing else."""
    models = cache_root() / "models"
    folder.mkdir()
    (folder / "models").symlink_to(models)
    monkeypatch.setenv("LORAPAR_CACHE", str(folder))


def stored(objects: Objects, stage: str, steps: int) -> bool:
    """Whether a part of a stage's work is in the store; of stage 2, so many steps."""
    if stage == "grpo":
        return bool(objects.listing("work/grpo")) and newest_step(objects) >= steps
    return any(objects.listing(f"work/{FOLDERS.get(stage, stage)}"))


def newest_step(objects: Objects) -> int:
    """Of stage 2's checkpoints."""
    return max(int(Path(name).stem.removeprefix("step-")) for name in objects.listing("work/grpo"))


@pytest.mark.chaos("label", "driver, other machine")
@pytest.mark.chaos("score", "driver, other machine")
@pytest.mark.chaos("sft", "driver, other machine")
@pytest.mark.chaos("grpo", "driver, other machine")
@pytest.mark.chaos("evaluate", "driver, other machine")
def test_a_run_killed_on_one_machine_ends_on_another_as_one_on_a_disk(
    chance: Random,
    recovery: Recovery,
    finished: FinishedRun,
    store: Uri,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, objects = ("run", finished.config, "-d", str(store), *SLOWLY), Objects(store)
    steps = chance.randint(1, GRPO_STEPS - 4)
    for before_it, stage in zip((None, *KILLED), KILLED, strict=False):
        machine(tmp_path / stage, monkeypatch)
        with recovery(before_it, OTHER) if before_it else nullcontext():  # until it is done and the next has begun
            stop_when(lambda stage=stage: stored(objects, stage, steps), signal.SIGKILL, *arguments)
        if stage == "grpo":
            [mirror] = (tmp_path / stage / "runs").iterdir()
            before, kept = metrics(mirror, "grpo"), newest_step(objects)
    machine(tmp_path / "last", monkeypatch)
    with recovery("evaluate", OTHER):
        again = lorapar(*arguments, timeout=500)
    assert again.returncode == 0, again.stderr
    secret = KEYS["AWS_SECRET_ACCESS_KEY"].encode()
    assert secret not in (again.stdout + again.stderr).encode()
    with looked_at(str(store)) as run:
        assert not [each for each in run.root.rglob("*") if each.is_file() and secret in each.read_bytes()]
        for stage in STAGES:
            ends_as_its_twin(stage, run.root, finished.run)
        lines = metrics(run.root, "grpo")
        kept = min(kept, len(before))  # what comes after the newest checkpoint is done again
        assert lines[:kept] == before[:kept]
        prompts = [prompt for line in lines for prompt in line["prompts"]]
        assert len(set(prompts)) == len(prompts)
        stages = json.loads((run.root / "manifest.json").read_text())["stages"]
        assert {each["status"] for each in stages.values()} == {"done"}
        assert (run.report / "index.html").is_file()
    taken = lorapar_here("export", "-d", store, "--stage", "sft", "-o", tmp_path / "taken")
    assert taken.returncode == 0, taken.stderr
    assert (tmp_path / "taken" / "adapter_model.safetensors").is_file()
    shown = lorapar_here("status", "-d", store).stdout
    assert f"{store} · no command is running" in shown and "✓ grpo" in shown
    assert not [name for name in objects.listing() if name.startswith(("work/grpo", "work/ray", "lock/"))]
