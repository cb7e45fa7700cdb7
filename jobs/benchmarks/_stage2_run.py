"""A run that is ready for stage 2, for benchmarks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory

GROUP = 8
RATE = 1e-5


@dataclass(frozen=True)
class Size:
    """A step's work, and the settings of engine and learner."""

    prompts: int
    tokens: int
    engine: dict[str, Any]
    rollout: dict[str, Any]
    learner: dict[str, Any]
    trl_batch: int
    """Completions in one pass of TRL."""

    @property
    def samples(self) -> int:
        return self.prompts * GROUP


SIZES = {
    "cpu": Size(
        prompts=8,
        tokens=48,
        engine={"max_model_len": 512, "max_num_seqs": 64, "enforce_eager": True},
        rollout={"cpus": 1, "threads": 2, "gpus": 0},
        learner={"cpus": 1, "threads": 2, "gpus": 0},
        trl_batch=16,
    ),
    "cuda": Size(
        prompts=32,
        tokens=256,
        engine={"max_model_len": 1024, "max_num_seqs": 256},
        rollout={"cpus": 4, "gpus": 0.5},
        learner={"cpus": 4, "gpus": 0.45},
        trl_batch=64,
    ),
}


def prepare(model: str, steps: int, folder: Path, size: Size) -> tuple[Config, RunDirectory]:
    """A run that has reached stage 2, with a new adapter and no partition."""
    questions = folder.with_name("questions.jsonl")
    questions.write_text("".join(json.dumps(question(number)) + "\n" for number in range(256)))
    config = Config.model_validate(
        {
            "name": "benchmark",
            "model": {"path": model},  # the template's system prompt, as in TRL
            "data": {"train": [{"reader": "file", "path": str(questions)}]},
            "adapter": {"rank": 8, "alpha": 16, "init": "gaussian"},
            "grpo": {
                "systems": [1, 2],
                "masked": False,
                "steps": steps,
                "prompts_per_step": size.prompts,
                "group_size": GROUP,
                "max_completion_length": size.tokens,
                "learning_rate": RATE,
                "refill_limit": 0,
                "rewards": [{"name": "reference_overlap"}],
                "rollout_engine": size.engine,
                "rollout_resources": size.rollout,
                "learner_resources": size.learner,
            },
        }
    )
    run = RunDirectory(folder)
    run.open(config)
    run_stage(config, run, "label")
    return config, run


def question(number: int) -> dict[str, str]:
    """A sum, and the sentence with which the reward compares."""
    a, b = 10 + 7 * number % 89, 10 + 11 * number % 83
    return {"prompt": f"What is {a} plus {b}?", "answer": str(a + b), "response": f"The sum of {a} and {b} is {a + b}."}
