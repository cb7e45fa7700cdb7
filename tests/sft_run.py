"""A run right before stage 1 (labels, adapter, region), made without Ray and without engines."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorapar_ray.adapters import read_adapter_state
from lorapar_ray.adapters.job import initialise
from lorapar_ray.config import Config
from lorapar_ray.datasets.labelled import token_table
from lorapar_ray.importance import GradSums, score
from lorapar_ray.partition import assign_regions, keep_top, save_regions
from lorapar_ray.partition.job import partition_stage
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import tiny_config
from tests.together import tasks_here

THETA = 0.5
BASE = {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "max_length": 128}


def ready_run(
    student: Path, folder: Path, init: str = "gaussian", dropout: float = 0.0, **sft: Any
) -> tuple[Config, RunDirectory]:
    """A run whose next stage is stage 1, on 24 rows; `sft` overrides its settings."""
    plain = tiny_config(student)
    rows = [{**source, "rows": 52} for source in plain["data"]["train"]]
    plain |= {
        "data": {**plain["data"], "train": rows},
        "label": {"strategy": "random"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": dropout, "init": init, "init_std": 0.05},
        "sft": {**BASE, **sft},
    }
    config, run, state = _with_adapter(student, plain, folder)
    scores = [score("random", state, GradSums.zeros(state), seed=seed) for seed in (1, 2)]
    kept = [keep_top(each, THETA) for each in scores]
    regions = assign_regions(*kept, *scores, alpha=1.0, beta=1.0)
    save_regions(regions, run.partition / "regions.safetensors", theta=THETA, alpha=1.0, beta=1.0)
    with tasks_here():
        token_table(config, run)
    return config, run


def ready_sequence(student: Path, folder: Path) -> tuple[Config, RunDirectory]:
    """The same with three Systems, which train one after the other in disjoint regions, two steps each."""
    plain = tiny_config(student) | {
        "order": ["sft"],
        "label": {"strategy": "random", "definitions": {1: "a", 2: "b", 3: "c"}},
        "adapter": {"rank": 4, "alpha": 8, "init": "gaussian", "init_std": 0.05},
        "partition": {"regions": "disjoint", "theta": THETA},
        "sft": {**BASE, "systems": [3, 1, 2], "sequence": True, "max_steps": 2},
    }
    config, run, state = _with_adapter(student, plain, folder)
    run.scores.mkdir()
    for system in config.scored:
        found = score("random", state, GradSums.zeros(state), seed=system)
        save_file(found, run.scores / f"system{system}.safetensors")
    partition_stage(config, run)
    with tasks_here():
        token_table(config, run)
    return config, run


def _with_adapter(
    student: Path, plain: dict[str, Any], folder: Path
) -> tuple[Config, RunDirectory, dict[str, torch.Tensor]]:
    """A labelled run, and the adapter that it starts from."""
    config, run = Config.model_validate(plain), RunDirectory(folder)
    run.open(config)
    run_stage(config, run, "label")
    model, adapter = config.model.model_dump(mode="json"), config.adapter.model_dump(mode="json")
    assert initialise(model, adapter, str(student), str(run.adapter), config.seed) is None
    return config, run, read_adapter_state(run.adapter)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors."""
    return load_file(folder / "adapter_model.safetensors")
