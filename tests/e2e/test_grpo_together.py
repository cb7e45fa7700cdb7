"""Stage 2 of two runs at once, on one base and one engine: each ends as it does alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorapar_ray.config import Config
from lorapar_ray.grpo.job import train_stage2
from lorapar_ray.grpo.together import shape_of, train_together, why_alone
from lorapar_ray.partition import load_regions, stage_mask
from lorapar_ray.runs import RunDirectory
from lorapar_ray.threads import meanwhile
from tests.e2e.drawing import require_each_step_and_prompt_once
from tests.processes import below
from tests.sft_run import ready_run, weights
from tests.tiny_run import metrics
from tests.together import tasks_here

pytestmark = pytest.mark.e2e
STEPS = 4


def ready(student: Path, folder: Path, **grpo: Any) -> tuple[Config, RunDirectory]:
    """A run whose next stage is stage 2, from an adapter that no stage has trained."""
    config, run = ready_run(student, folder)
    settings = {**config.grpo.model_dump(mode="json"), "steps": STEPS, "sync": "adapter", **grpo}
    return Config.model_validate({**config.model_dump(mode="json"), "order": ["grpo"], "grpo": settings}), run


@pytest.fixture(scope="module")
def arms(cluster: None, student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, RunDirectory]:
    """Two arms with different settings, after their steps."""
    root = tmp_path_factory.mktemp("arms")
    other = {"learning_rate": 5e-3, "masked": False, "loss": "grpo", "steps": STEPS + 2, "prompts_per_step": 3}
    one, two = (ready(student, root / name, **own) for name, own in (("one", {}), ("two", other)))
    assert why_alone(one[0]) is why_alone(two[0]) is None and shape_of(one[0]) == shape_of(two[0])
    with tasks_here():
        notes = train_together([one, two])
    assert [each["steps"] for each in notes] == [STEPS, STEPS + 2]
    return one[1], two[1]


def test_each_arm_trains_on_its_own_policy_in_its_own_way(arms: tuple[RunDirectory, RunDirectory]) -> None:
    """The engine's probabilities of what an arm trains on are those of the arm's own learner."""
    for run, steps in zip(arms, (STEPS, STEPS + 2), strict=True):
        lines = metrics(run.root, "grpo")
        assert [line["policy_version"] for line in lines] == list(range(1, steps + 1))
        assert all(line["staleness"] == 0 and line["canary_gap"] <= 1e-3 for line in lines)
        gaps = [line["logprob_gap"] for line in lines if "logprob_gap" in line]  # a step without an update has none
        assert gaps and max(gaps) <= 1e-3
    moves_only_its_region(arms[0])
    before, after = weights(arms[1].adapter), weights(arms[1].grpo / "adapter")
    assert all(not torch.equal(before[key], value) for key, value in after.items())  # without a mask


@pytest.mark.long
def test_an_arm_ends_as_it_does_alone(arms: tuple[RunDirectory, RunDirectory], student: Path, tmp_path: Path) -> None:
    alone, run = ready(student, tmp_path / "alone"), arms[0]
    with tasks_here():
        train_stage2(*alone)
    for ours, theirs in zip(metrics(run.root, "grpo"), metrics(alone[1].root, "grpo"), strict=True):
        for name, tolerance in (("reward", 1e-6), ("completion_length", 1e-6), ("loss", 1e-4), ("grad_norm", 1e-3)):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-6), (ours["step"], name)
    after, reference = weights(run.grpo / "adapter"), weights(alone[1].grpo / "adapter")
    for key, value in reference.items():
        torch.testing.assert_close(after[key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("victim", ["ray::EngineActor", "VLLM::EngineCore", "ray::Coordinator"])
def test_a_process_that_all_arms_use_may_die(cluster: None, student: Path, tmp_path: Path, victim: str) -> None:
    arms = [ready(student, tmp_path / name, steps=6, learning_rate=rate) for name, rate in (("a", 1e-2), ("b", 5e-3))]
    killed: list[int] = []

    def kill_once() -> None:
        if not killed and all(len(metrics(run.root, "grpo")) >= 2 for _, run in arms):
            found = below(victim)[0]
            killed.append(found.pid)
            found.kill()

    with tasks_here(), meanwhile(kill_once, every_s=0.1):
        notes = train_together(arms)
    assert len(killed) == 1 and [each["steps"] for each in notes] == [6, 6]
    for _, run in arms:
        lines = metrics(run.root, "grpo")
        assert len(lines) == 6
        assert all(line["staleness_max"] == 0 and line["canary_gap"] < 0.01 for line in lines)
        if victim != "ray::Coordinator":  # which takes its count with it
            assert lines[-1]["engines_replaced"] == 1
        require_each_step_and_prompt_once(lines, notes[0]["prompts"])
        moves_only_its_region(run)


def moves_only_its_region(run: RunDirectory) -> None:
    """Stage 2 changes elements of its mask, and not one bit of the others."""
    before, after = weights(run.adapter), weights(run.grpo / "adapter")
    mask = stage_mask(load_regions(run.partition / "regions.safetensors")[0], stage=2)
    assert any(not torch.equal(before[key], after[key]) for key in mask)
    for key, active in mask.items():
        assert torch.equal(before[key].view(torch.int32)[~active], after[key].view(torch.int32)[~active]), key
