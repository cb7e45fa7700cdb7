"""A run that stands right before stage 1: labelled, an adapter, a region, all made without Ray and without engines."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorapar_ray.adapters import adapter_state, attach_lora, residual_base, save_adapter
from lorapar_ray.config import Config
from lorapar_ray.importance import GradSums, score
from lorapar_ray.partition import assign_regions, keep_top, save_regions
from lorapar_ray.pipeline import run_stage
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import tiny_config

THETA = 0.5
BASE = {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "max_length": 128}


def ready_run(
    student: Path, folder: Path, init: str = "gaussian", dropout: float = 0.0, **sft: Any
) -> tuple[Config, RunDirectory]:
    """Stage 1 on 24 rows is next; `sft` overrides its settings."""
    plain = tiny_config(student)
    rows = [{**source, "rows": 52} for source in plain["data"]["train"]]
    plain |= {
        "data": {**plain["data"], "train": rows},
        "label": {"strategy": "random"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": dropout, "init": init},
        "sft": {**BASE, **sft},
    }
    config, run = Config.model_validate(plain), RunDirectory(folder)
    run.open(config)
    run_stage(config, run, "label")
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    peft_model = attach_lora(model, rank=4, alpha=8, dropout=dropout, init=init, seed=config.seed, init_std=0.05)
    save_adapter(peft_model, run.adapter)
    state = adapter_state(peft_model)
    if init != "gaussian":
        residual_base(peft_model).save_pretrained(run.adapter / "base")
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(student).save_pretrained(run.adapter / "base")
    scores = [score("random", state, GradSums.zeros(state), seed=seed) for seed in (1, 2)]
    kept = [keep_top(each, THETA) for each in scores]
    regions = assign_regions(*kept, *scores, alpha=1.0, beta=1.0)
    save_regions(regions, run.partition / "regions.safetensors", theta=THETA, alpha=1.0, beta=1.0)
    return config, run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors."""
    return load_file(folder / "adapter_model.safetensors")
