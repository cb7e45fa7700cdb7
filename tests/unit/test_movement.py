"""What training moved, against a mask: on small adapters that were trained, and in a grid's report."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorapar_ray.ablations.grid import Claim
from lorapar_ray.ablations.movement import Held, Overlap, decide, read_overlap
from lorapar_ray.ablations.plan import make_plan
from lorapar_ray.ablations.report import report
from lorapar_ray.errors import UserError
from lorapar_ray.partition import load_regions, save_regions, stage_mask
from lorapar_ray.partition.movement import Movement, most_moved, movement
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.arm import Worker
from lorapar_ray.sft.job import train_stage1
from tests.sft_run import ready_run, weights
from tests.tiny_run import ROOT, save_tiny_student
from tests.unit.finished_units import record_finished

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """Two runs from the same adapter and with the same regions: stage 1 with its mask, and without."""
    student = save_tiny_student(tmp_path_factory.mktemp("student"))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorapar_ray.sft.job.run_workers", lambda work, payload, **_: work(payload))
        patch.setattr("lorapar_ray.sft.worker.this_worker", lambda: Worker(0, 1, torch.device("cpu")))
        for name in ("masked", "unmasked"):
            folder = tmp_path_factory.mktemp(name)
            config, run = ready_run(student, folder, masked=name == "masked", max_steps=3)
            train_stage1(config, run)
            found[name] = run
    return found


def test_the_elements_that_moved_most_are_as_many_as_the_mask_keeps() -> None:
    before = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    after = {"a": torch.tensor([[0.0, -0.5, 0.1], [0.3, 0.0, 0.2]]), "b": torch.tensor([1.0, 0.6])}
    moved = most_moved(before, after, 3)
    assert moved["a"].tolist() == [[False, True, False], [True, False, False]] and moved["b"].tolist() == [False, True]
    mask = {"a": torch.tensor([[True, True, False], [True, False, False]]), "b": torch.zeros(2, dtype=torch.bool)}
    found = movement(before, after, mask)
    assert (found.kept, found.moved, found.mask) == (3 / 8, 5 / 8, 2 / 4)
    with pytest.raises(UserError, match="adapter and mask: 'b' is in only one of them"):
        movement(before, after, {"a": mask["a"]})


@pytest.mark.slow
def test_a_masked_run_moves_its_mask_and_an_unmasked_one_no_more_of_it_than_of_another(
    trained: dict[str, RunDirectory],
) -> None:
    """The regions here are of random scores, so only a mask can lead the training to them."""
    found = {}
    for name, run in trained.items():
        mask = stage_mask(load_regions(run.partition / "regions.safetensors")[0], 1)
        found[name] = movement(weights(run.adapter), weights(run.sft / "adapter"), mask)
        chance = found[name].kept / (2 - found[name].kept)
        assert found[name].random == pytest.approx(chance, abs=0.03)
    assert found["masked"].mask > 0.95 and found["masked"].moved <= found["masked"].kept < 0.9
    assert found["unmasked"].mask == pytest.approx(found["unmasked"].random, abs=0.05)
    assert found["unmasked"].moved > 0.95


def test_a_claim_about_movement_is_decided_over_seeds() -> None:
    claim = Claim("the mask holds what moves", "importance", "full-lora")
    found = decide(claim, [Overlap(seed, Movement(0.4, 1.0, 0.3 + 0.01 * seed, 0.25), 0.5) for seed in (1, 2, 3)])
    assert isinstance(found, Held) and found.found == "held" and found.effect.difference == pytest.approx(0.07)
    assert "index of 0.320 with the mask of importance and 0.250 with a random one of its size" in found.sentence
    assert "difference +0.070, 95 % interval +0.045 to +0.095 over 3 seeds; masks of two random" in found.sentence
    halves = (0.5, None, 0.7)
    some = decide(claim, [Overlap(seed, Movement(0.4, 1.0, 0.3, 0.2), each) for seed, each in enumerate(halves)])
    assert isinstance(some, Held) and "random halves of the scored examples agree by 0.600" in some.sentence
    few = decide(claim, [Overlap(1, Movement(0.4, 1.0, 0.9, 0.25), None)])
    assert few.found == "undecided" and "interval" not in few.sentence
    none = decide(claim, [])
    assert none.found == "undecided" and "no seed has results of both, with adapters of one shape" in none.sentence
    null = decide(claim, [Overlap(seed, Movement(0.4, 1.0, 0.25 + 0.001 * seed, 0.252), None) for seed in (1, 2, 3)])
    assert isinstance(null, Held) and null.found == "not held" and null.effect.difference == pytest.approx(0)
    assert null.sentence.endswith("a difference within 0.01 counts as none, so the claim did not hold here.")


@pytest.mark.slow
def test_a_grid_reports_what_its_unmasked_arm_moved(trained: dict[str, RunDirectory], tmp_path: Path) -> None:
    config = ROOT / "jobs" / "configs" / "arithmetic.yaml"
    plan = make_plan("mask", config, [], tmp_path, seeds=[1, 2, 3], only=["importance", "full-lora"], rates=[1])
    for unit in plan.units({}):
        run, source = unit.run, trained["unmasked"]
        for place in ("adapter", "sft/adapter", "partition"):
            shutil.copytree(source.root / place, run.root / place)
        if unit.arm == "importance":  # the mask is exactly what its seed's other run moves most
            before, after = weights(source.adapter), weights(source.sft / "adapter")
            count = sum(each.numel() for each in before.values()) * (3 + unit.seed) // 10
            kept = {key: each.to(torch.uint8) * 5 for key, each in most_moved(before, after, count).items()}
            save_regions(kept, run.partition / "regions.safetensors", theta=0.9, alpha=1.0, beta=1.0)
            control = [{"jaccard": {"system1": 0.4 + unit.seed / 10}}]
            (run.partition / "summary.json").write_text(json.dumps({"control": control}))
        record_finished(unit)
    text = report(plan)
    assert "- **held**: The importance mask holds what training moves most: the 50.0% of the elements" in text
    assert "random halves of the scored examples agree by 0.600" in text
    rows = list(csv.reader((tmp_path / "movement.csv").read_text().splitlines()))
    assert [row[:2] for row in rows[1:]] == [["full-lora", str(seed)] for seed in (1, 2, 3)]
    assert [float(row[2]) for row in rows[1:]] == pytest.approx([0.4, 0.5, 0.6], abs=1e-3)
    assert {row[4] for row in rows[1:]} == {"1"} and rows[1][6] == "0.5"
    assert "| full-lora | 2 | 50.0% | " in text and "| 1.000 | " in text
    assert (tmp_path / "movement.md").read_text() in text and "tabular" in (tmp_path / "movement.tex").read_text()
    page = (tmp_path / "index.html").read_text()
    assert "The mask against what training moved" in page and "✓ held" in page


@pytest.mark.slow
def test_an_adapter_of_another_shape_has_no_overlap(trained: dict[str, RunDirectory], tmp_path: Path) -> None:
    """PiSSA's is exported with twice the rank."""
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(trained["masked"].root, run.root)
    assert read_overlap(run.root, run.root, 1) is not None
    doubled = {key: torch.cat([each, each]) for key, each in weights(run.sft / "adapter").items()}
    save_file(doubled, run.sft / "adapter" / "adapter_model.safetensors")
    assert read_overlap(run.root, run.root, 1) is None
