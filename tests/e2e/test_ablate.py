"""Grids for real: three Systems one after the other, in disjoint regions and without a mask; and one that is killed."""

import json
import signal
from pathlib import Path
from random import Random

import pytest
import torch

from lorapar_ray.partition.systems import mask_of_systems
from lorapar_ray.runs import RunDirectory
from tests.chaos import Recovery
from tests.e2e.test_interruption import stop_when
from tests.e2e.twin import is_done
from tests.sft_run import weights
from tests.tiny_run import lorapar_here, metrics, save_tiny_student, tiny_config, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.long]
TASKS = {1: "chain_sum", 2: "letter_counting", 3: "gcd"}


def sources(rows: int, seed: int) -> list[dict[str, object]]:
    return [
        {"system": system, "reader": "reasoning_gym", "task": task, "rows": rows, "seed": seed}
        for system, task in TASKS.items()
    ]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_system_moves_no_element_of_another_ones_region(cluster: None, tmp_path: Path) -> None:
    plain = tiny_config(save_tiny_student(tmp_path / "student"))
    plain |= {
        "data": {"train": sources(12, 1), "test": sources(5, 2)},
        "label": {"strategy": "source", "definitions": TASKS},
        "partition": {"theta": 0.9},
        "sft": {**plain["sft"], "systems": [1, 2, 3], "epochs": 1, "weight_decay": 0.1},
        "order": ["sft"],
    }
    out = tmp_path / "out"
    command = ["ablate", "systems", write_config(tmp_path / "tiny.yaml", plain), "--out", out, "--seeds", "1"]
    command += ["--only", "disjoint", "--only", "unmasked"]
    done = lorapar_here(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sft of 2 runs at once" in done.stdout and "evaluate of 2 runs at once" in done.stdout

    disjoint, unmasked = (RunDirectory(out / f"{arm}-1") for arm in ("disjoint", "unmasked"))
    regions = disjoint.partition / "systems.safetensors"
    masks = {system: mask_of_systems(regions, [system]) for system in TASKS}
    assert json.loads((disjoint.partition / "systems.json").read_text())["control"].keys() == {"1-2", "1-3", "2-3"}
    for key in masks[1]:
        assert int(sum(mask[key].int() for mask in masks.values()).max()) <= 1  # type: ignore[union-attr]
    names = ["sft-1", "sft-2", "sft"]
    for run in (disjoint, unmasked):
        before = weights(run.adapter)
        for system, name in zip(TASKS, names, strict=True):
            after = weights(run.trained(name) / "adapter")
            moved = {key: before[key].view(torch.int32) != after[key].view(torch.int32) for key in before}
            assert sum(int(changed.sum()) for changed in moved.values()) > 1000
            for key, changed in moved.items():
                assert run is unmasked or not (changed & ~masks[system][key]).any(), f"System {system} moved {key}"
            before = after
    assert (disjoint.adapter / "adapter_model.safetensors").read_bytes() == (
        unmasked.adapter / "adapter_model.safetensors"
    ).read_bytes()

    cells = (out / "systems.csv").read_text().splitlines()
    assert len(cells) == 1 + 2 * 9
    found = json.loads((disjoint.eval / "sft-2.json").read_text())
    assert found["n"] == 15 and found["by_task"].keys() == set(TASKS.values())
    table = (out / "systems.md").read_text()
    assert "Accuracy of disjoint" in table and "Disjoint regions forget less than training every element" in table

    finished = disjoint.manifest_path.read_bytes()
    again = lorapar_here(*command)
    assert again.returncode == 0 and "at once" not in again.stdout
    assert disjoint.manifest_path.read_bytes() == finished


@pytest.mark.chaos("sft", "driver")
@pytest.mark.chaos("evaluate", "driver")
def test_a_killed_grid_goes_on_and_ends_as_one_that_was_not(
    cluster: None, chance: Random, recovery: Recovery, tmp_path: Path
) -> None:
    """Killed while several runs train on one base, and again at a drawn moment of what follows."""
    plain = tiny_config(save_tiny_student(tmp_path / "student")) | {"label": {"strategy": "random"}, "order": ["sft"]}
    plain["sft"] |= {"epochs": 8}  # so that it is killed before it is over
    file, arms = write_config(tmp_path / "tiny.yaml", plain), ("importance", "random", "smaller-lora")

    def grid(out: Path) -> list[str | Path]:
        only = [each for arm in arms for each in ("--only", arm)]
        return ["ablate", "mask", file, "--out", out, "--seeds", "1", "--rates", "1", *only]

    def steps(folder: Path) -> list[int]:
        return [line["step"] for line in metrics(folder, "sft")]

    twin, killed = tmp_path / "twin", tmp_path / "killed"
    done = lorapar_here(*grid(twin))
    assert done.returncode == 0 and "sft of 2 runs at once" in done.stdout, done.stdout + done.stderr
    total = len(steps(twin / "importance-1"))
    step, last = chance.randint(1, total // 2), chance.choice(["importance-1", "smaller-lora-1"])
    stop_when(lambda: len(steps(killed / "importance-1")) >= step, signal.SIGKILL, *grid(killed))
    # its workers may make their last steps before they notice
    assert not is_done(killed / "importance-1", "sft"), "stage 1 was over before anything could be killed"
    with recovery("sft", "driver"):
        stop_when(lambda: is_done(killed / last, "sft"), signal.SIGKILL, *grid(killed))
    assert not (killed / last / "eval" / "sft.json").exists()
    finished = RunDirectory(killed / "importance-1").entry("sft")
    with recovery("evaluate", "driver"):
        again = lorapar_here(*grid(killed))
    assert again.returncode == 0, again.stdout + again.stderr
    assert RunDirectory(killed / "importance-1").entry("sft") == finished, "a finished stage ran again"
    for arm in arms:
        ours, theirs = killed / f"{arm}-1", twin / f"{arm}-1"
        assert steps(ours) == steps(theirs) == list(range(1, total + 1))
        ranks = [json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] for run in (ours, theirs)]
        assert ranks[0] == ranks[1] and (ranks[0] < 4) == (arm == "smaller-lora")
        expected = weights(theirs / "sft" / "adapter")
        for key, value in weights(ours / "sft" / "adapter").items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    assert (killed / "table.md").read_text() == (twin / "table.md").read_text()
