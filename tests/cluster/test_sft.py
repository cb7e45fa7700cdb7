"""Stage 1's result does not depend on workers, packing, sharding, accumulation, checkpointing or a kill."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorapar_ray.config import Config
from lorapar_ray.partition import load_regions, stage_mask
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.job import train_stage1
from lorapar_ray.sft.together import shape_of, train_together, why_alone
from tests.chaos import Recovery
from tests.processes import a_worker_dies
from tests.sft_run import ready_run, weights
from tests.tiny_run import lorapar_here, metrics, tiny_config, write_config
from tests.together import run_together, tasks_here

pytestmark = pytest.mark.cluster
LOSS_TOLERANCE = 2e-5
"""Relative, per step, in float32 (measured: below 2e-6); the additions run in another order."""
EXPORT_TOLERANCE = 1e-4
"""Absolute, on float32 logits: the export adds and subtracts the part that the residual base lacks."""
MEASURED = {"epochs": 2, "validation": 0.2, "validate_every": 2, "keep": "last"}
TWO_WORKERS = {"workers": 2, "resources": {"cpus": 0.5}}


LAYOUTS: dict[str, dict[str, Any]] = {
    "two workers": {**TWO_WORKERS, "micro_batch_size": 2},
    "a cut base": {**TWO_WORKERS, "sharding": "fsdp2", "gradient_checkpointing": True, "micro_batch_size": 3},
    "packed rows": {**TWO_WORKERS, "packing": True, "micro_batch_size": 1},
}
ARMS: dict[str, dict[str, Any]] = {
    "an arm": LAYOUTS["two workers"],
    "another arm": {**LAYOUTS["two workers"], "learning_rate": 3e-3, "masked": False, "schedule": "linear"},
}
DROPPING: dict[str, Any] = {**TWO_WORKERS, "epochs": 8, "micro_batch_size": 2, "checkpoint_every": 2, "dropout": 0.2}
"""With dropout, so that the random generators' states matter."""
STEADY = {"schedule": "constant", "warmup_ratio": 0.0, "validation": 0.3, "validate_every": 1}


@pytest.fixture(scope="module")
def by_one(cluster: None, student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """Runs of one worker: `alone` trains two epochs with one forward pass per step; `stopped` trains PiSSA with much
    too high a rate, until its validation loss has not fallen twice."""
    root = tmp_path_factory.mktemp("by_one")
    stopping = {"init": "pissa", "epochs": 20, "patience": 2, "learning_rate": 0.05, **STEADY}
    return trained(
        {
            "alone": ready_run(student, root / "alone", micro_batch_size=8, **MEASURED),
            "stopped": ready_run(student, root / "stopped", **stopping),
        }
    )


@pytest.fixture(scope="module")
def by_two(cluster: None, student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """The two epochs of `alone`: in each layout, and with an arm that has another rate and trains every element. And
    what a killed worker's run has to end as."""
    root = tmp_path_factory.mktemp("by_two")
    arms = {name: ready_run(student, root / name, **MEASURED, **how) for name, how in ARMS.items()}
    members = list(arms.values())
    assert [why_alone(config) for config, _ in members] == [None, None]
    assert len({shape_of(config) for config, _ in members}) == 1
    alone = {name: ready_run(student, root / name, **MEASURED, **how) for name, how in LAYOUTS.items()}
    undisturbed = {"undisturbed": ready_run(student, root / "undisturbed", **DROPPING)}
    return trained(alone | undisturbed, arms)


def test_the_command_shows_that_a_workers_tracker_fails(
    cluster: None, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = ready_run(student, tmp_path, max_steps=2)
    run.metrics.mkdir(exist_ok=True)
    (run.metrics / "tensorboard").write_text("no folder")
    with tasks_here():
        train_stage1(config, run)
    assert capsys.readouterr().out.count("tensorboard takes no curves now") == 1
    assert [line["step"] for line in metrics(run.root, "sft")] == [1, 2]


def trained(
    runs: dict[str, tuple[Config, RunDirectory]], arms: dict[str, tuple[Config, RunDirectory]] | None = None
) -> dict[str, RunDirectory]:
    """Each of `runs`, and the `arms` together, in one group."""
    stages: list[Callable[[], Any]] = [partial(train_stage1, *each) for each in runs.values()]
    together = [partial(train_together, list(arms.values()))] if arms else []
    run_together(["lorapar_ray.sft.job", "lorapar_ray.sft.together"], [*stages, *together])
    return {name: run for name, (_, run) in (runs | (arms or {})).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_no_loss(
    layout: str, by_one: dict[str, RunDirectory], by_two: dict[str, RunDirectory]
) -> None:
    run, alone = by_two[layout], by_one["alone"]
    ours, theirs = metrics(run.root, "sft"), metrics(alone.root, "sft")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, len(theirs) + 1))
    for name, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", 1e-3)):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine[name] == pytest.approx(other[name], rel=tolerance)
    assert validation_losses(run) == pytest.approx(validation_losses(alone), rel=LOSS_TOLERANCE)
    before, after, reference = weights(run.adapter), weights(run.sft / "adapter"), weights(alone.sft / "adapter")
    mask = stage_mask(load_regions(run.partition / "regions.safetensors")[0], stage=1)
    for key, active in mask.items():
        assert torch.equal(before[key].view(torch.int32)[~active], after[key].view(torch.int32)[~active]), key
        assert not torch.equal(before[key][active], after[key][active]), key
        torch.testing.assert_close(after[key], reference[key], rtol=1e-2, atol=1e-3)


def test_arms_at_once_leave_the_files_that_each_leaves_alone(
    by_one: dict[str, RunDirectory], by_two: dict[str, RunDirectory]
) -> None:
    alone, run, other = by_one["alone"], by_two["an arm"], by_two["another arm"]
    assert len(metrics(alone.root, "sft")) == len(metrics(run.root, "sft")) == len(metrics(other.root, "sft"))
    for mine, line in zip(metrics(run.root, "sft"), metrics(alone.root, "sft"), strict=True):
        assert mine["loss"] == pytest.approx(line["loss"], rel=LOSS_TOLERANCE)
        assert mine.keys() == line.keys()
    assert validation_losses(run) == pytest.approx(validation_losses(alone), rel=LOSS_TOLERANCE)
    for key, value in weights(alone.sft / "adapter").items():
        torch.testing.assert_close(weights(run.sft / "adapter")[key], value, rtol=1e-2, atol=1e-3)
        assert not torch.equal(weights(other.sft / "adapter")[key], weights(other.adapter)[key])
    names = [sorted(path.name for path in (each.sft / "adapter").iterdir()) for each in (run, other, alone)]
    assert names[0] == names[1] == names[2]
    text = "adapter_config.json"
    assert json.loads((run.sft / "adapter" / text).read_text()) == json.loads(
        (alone.sft / "adapter" / text).read_text()
    )
    assert not list(run.work.glob("sft/checkpoints/*"))


@pytest.mark.chaos("sft", "worker")
def test_a_killed_worker_ends_in_the_same_adapter(
    chance: Random, recovery: Recovery, by_two: dict[str, RunDirectory], student: Path, tmp_path: Path
) -> None:
    config, run = ready_run(student, tmp_path / "run", **DROPPING)

    def trained() -> list[dict[str, Any]]:
        return metrics(run.root, "sft")

    with a_worker_dies("sft", chance.randint(1, 8), trained, chance, recovery) as before:
        train_stage1(config, run)
    ours, theirs = trained(), metrics(by_two["undisturbed"].root, "sft")
    assert 0 < len(before) < len(theirs)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for key, value in weights(by_two["undisturbed"].sft / "adapter").items():
        assert torch.equal(weights(run.sft / "adapter")[key], value), key


def validation_losses(run: RunDirectory) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(run.root, "sft_validation")}


def test_a_validation_split_stops_early(by_one: dict[str, RunDirectory]) -> None:
    """That it keeps the best step is tested in unit/test_sft_loop.py."""
    stopped = by_one["stopped"]
    losses = validation_losses(stopped)
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 2 < 40, losses
    assert len(list((stopped.metrics / "tensorboard").rglob("events.out.tfevents.*"))) == 1


def test_the_export_leaves_the_residual_base_behind(by_one: dict[str, RunDirectory], student: Path) -> None:
    stopped = by_one["stopped"]
    ids = torch.arange(100, 132).view(2, 16)

    def logits(base: Path, adapter: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            found: torch.Tensor = PeftModel.from_pretrained(model, str(adapter))(ids).logits
        return found

    trained = logits(stopped.adapter / "base", stopped.sft / "trained")
    torch.testing.assert_close(logits(student, stopped.sft / "adapter"), trained, rtol=1e-3, atol=EXPORT_TOLERANCE)
    assert (logits(stopped.adapter / "base", stopped.adapter) - trained).abs().max() > 10 * EXPORT_TOLERANCE


def test_a_baseline_without_engine_or_partition_runs_from_label_to_report(
    cluster: None, student: Path, tmp_path: Path
) -> None:
    plain = tiny_config(student) | {
        "label": {"strategy": "random"},
        "order": ["sft"],
        "adapter": {"method": "prefix_tuning", "virtual_tokens": 4},
        "sft": {"masked": False, "max_steps": 2, "batch_size": 4, "max_length": 128},
    }
    done = lorapar_here("run", write_config(tmp_path / "config.yaml", plain), "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for name in ("base", "sft"):
        assert json.loads((tmp_path / "run" / "eval" / f"{name}.json").read_text())["n"] == 12
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert {path.name for path in (tmp_path / "run" / "sft" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
