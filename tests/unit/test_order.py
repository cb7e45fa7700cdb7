"""The order of the training stages, and the steps that a run without a partition skips."""

from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import PIPELINE, STAGES, check, pending, stages_of
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory
from lorapar_ray.student import starting_adapter
from tests.tiny_run import tiny_config, write_config
from tests.unit.faked_stages import lorapar


def config_of(**changes: Any) -> Config:
    return Config.model_validate({**tiny_config(Path("student")), "label": {"strategy": "random"}, **changes})


@pytest.mark.parametrize(
    ("order", "stages", "models"),
    [
        (["sft", "grpo"], STAGES, ["base", "sft", "grpo"]),
        (
            ["grpo", "sft"],
            ("label", "score", "partition", "grpo", "sft", "evaluate", "report"),
            ["base", "grpo", "sft"],
        ),
        (["sft"], ("label", "score", "partition", "sft", "evaluate", "report"), ["base", "sft"]),
    ],
)
def test_stages_follow_the_order(order: list[str], stages: tuple[str, ...], models: list[str], tmp_path: Path) -> None:
    config = config_of(order=order)
    assert stages_of(config) == stages
    assert config.evaluated == models
    assert pending(config, RunDirectory(tmp_path)) == list(stages)


def test_each_stage_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    forward, backward = config_of(), config_of(order=["grpo", "sft"])
    assert [starting_adapter(forward, run, stage) for stage in ("sft", "grpo")] == [run.adapter, run.sft / "adapter"]
    assert [starting_adapter(backward, run, stage) for stage in ("grpo", "sft")] == [run.adapter, run.grpo / "adapter"]
    (run.grpo / "trained").mkdir(parents=True)  # relative to a residual base
    assert starting_adapter(backward, run, "sft") == run.grpo / "trained"
    assert "grpo" in PIPELINE["sft"].needs(backward) and "grpo" not in PIPELINE["sft"].needs(forward)


def test_a_stage_outside_the_order_is_refused(tmp_path: Path) -> None:
    config, run = config_of(order=["sft"]), RunDirectory(tmp_path / "run")
    run.open(config)
    with pytest.raises(UserError, match=r"grpo: not in this run's order \[sft\]"):
        run_stage(config, run, "grpo")


def test_a_stage_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set sft\.epochs to 2"):
        config_of(order=["sft", "sft"])


def test_without_masks_there_is_nothing_to_score(tmp_path: Path) -> None:
    """Prompt tuning through label, score and partition: no Ray, no adapter, no regions, and all stages are done."""
    config = config_of(order=["sft"], sft={"masked": False}, adapter={"method": "prompt_tuning"})
    assert not config.partitioned
    assert config_of(order=["sft"], grpo={"masked": False}).partitioned
    run = RunDirectory(tmp_path / "run")
    run.open(config)
    for name in ("label", "score", "partition"):
        run_stage(config, run, name)
    assert pending(config, run) == ["sft", "evaluate", "report"]
    again = lorapar(
        "partition", "-c", write_config(tmp_path / "c.yaml", config.model_dump(mode="json")), "-d", run.root
    )
    assert again[0] == 0 and "nothing to cut" in again[1]
    assert not run.scores.exists() and not run.partition.exists() and not run.adapter.exists()
    masked = config.model_copy(update={"sft": config.sft.model_copy(update={"masked": True})})
    assert "score" in pending(masked, run)


def test_a_residual_base_in_four_bits_is_refused() -> None:
    model = {"path": "student", "quantization": "nf4"}
    with pytest.raises(ValueError, match=r"adapter\.init: pissa subtracts from the base's weights"):
        config_of(model=model, adapter={"init": "pissa"})
    config_of(model=model, adapter={"init": "gaussian"})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": {"train": tiny_config(Path("student"))["data"]["train"]}}, "data.test: no source to evaluate on"),
        ({"grpo": {"rewards": [{"name": "brilliance"}]}}, "grpo.rewards: 'brilliance' is unknown"),
    ],
)
def test_late_errors_are_found_before_a_run_begins(changes: dict[str, Any], problem: str) -> None:
    config = config_of(**changes)
    with pytest.raises(UserError, match=problem):
        check(config, stages_of(config))
    check(config, ("label", "score"))


IA3 = {"adapter": {"method": "ia3"}, "sft": {"masked": False}, "order": ["sft"]}


@pytest.mark.parametrize(
    ("before", "after", "stage", "decides"),
    [
        ({"sft": {"batch_size": 4}}, {"sft": {"batch_size": 8}}, "score", True),  # by the warm-up
        ({"sft": {"epochs": 1}}, {"sft": {"epochs": 2}}, "score", False),
        (IA3, {**IA3, "adapter": {"method": "prompt_tuning"}}, "sft", True),
    ],
)
def test_a_stage_knows_the_settings_that_decide_it(
    before: dict[str, Any], after: dict[str, Any], stage: str, decides: bool
) -> None:
    settings = PIPELINE[stage].settings
    assert (settings(config_of(**before)) != settings(config_of(**after))) == decides
