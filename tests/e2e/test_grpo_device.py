"""Stage 2 with its engine and its learner on CPUs, or both on one GPU: the same steps, verified in the same way."""

from pathlib import Path

import pytest
import torch

from lorapar_ray.config import Config
from lorapar_ray.gpus import place, sync_of
from lorapar_ray.pipeline import is_done
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory
from tests.sft_run import weights
from tests.tiny_run import ENGINE, SOURCES, metrics, tiny_config
from tests.together import tasks_here

pytestmark = pytest.mark.e2e
STEPS = 2


@pytest.mark.parametrize(
    ("gpus", "shares", "sync"),
    [
        pytest.param(0, (0, 0), "merged", marks=pytest.mark.long),
        pytest.param(1, (0.6, 0.4), "adapter", marks=pytest.mark.gpu),
    ],
)
def test_steps_of_an_engine_and_a_learner(
    gpus: int, shares: tuple[float, float], sync: str, cluster: None, student: Path, tmp_path: Path
) -> None:
    """On a GPU: a LoRA policy in an engine with CUDA graphs, which shares it with the learner."""
    plain = tiny_config(student)
    own = {"steps": STEPS, "masked": False, "systems": [2], "rollout_engine": {**ENGINE, "enforce_eager": not gpus}}
    parts = {
        "order": ["grpo"],
        "data": {
            "train": [{**SOURCES["train"][0], "rows": rows, "system": number} for number, rows in ((1, 12), (2, 36))]
        },
        "label": {"strategy": "source"},
        "adapter": {"rank": 4, "alpha": 8, "init": "gaussian", "init_std": 0.05},
        "grpo": plain["grpo"] | own,
    }
    config, run = Config.model_validate(plain | parts), RunDirectory(tmp_path / "run")
    run.open(config)
    grpo = place(config, "grpo", gpus).grpo
    assert (grpo.rollout_resources.gpus, grpo.learner_resources.gpus) == shares and sync_of(grpo) == sync
    with tasks_here():
        for stage in ("label", "score", "partition", "grpo"):
            run_stage(place(config, stage, gpus), run, stage)
    lines = metrics(run.root, "grpo")
    assert is_done(config, run, "grpo") and [line["policy_version"] for line in lines] == [1, 2]
    assert all(line["canary_gap"] <= line["canary_tolerance"] for line in lines)
    before, after = weights(run.adapter), weights(run.grpo / "adapter")
    assert any(not torch.equal(before[key], value) for key, value in after.items())
