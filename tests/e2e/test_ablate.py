"""A grid for real: three Systems one after the other, in disjoint regions and without a mask."""

import json
from pathlib import Path

import pytest
import torch

from lorapar_ray.partition.systems import mask_of_systems
from lorapar_ray.runs import RunDirectory
from tests.sft_run import weights
from tests.tiny_run import lorapar_here, save_tiny_student, tiny_config, write_config

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
