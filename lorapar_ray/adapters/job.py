"""Make the adapter of a run, as a task on a machine that can hold the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorapar_ray.config import AdapterConfig, Config, ModelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory, atomic_path
from lorapar_ray.student import RESIDUAL_INITS, base_path, load_base
from lorapar_ray.workers import require, worker_environment


def make_adapter(config: Config, run: RunDirectory, target: Path) -> None:
    """Attach the config's adapter to the student and save it to `target`, on a machine with `score.resources`.

    Raises:
        UserError: the model has none of the target modules, or `adapter.path` holds no LoRA adapter.
    """
    import ray

    adapter = config.adapter.model_dump(mode="json")
    if config.adapter.path is not None:
        require_lora(Path(config.adapter.path))
        adapter["path"] = str(Path(config.adapter.path).resolve())

    if not (target / "adapter_config.json").is_file():
        require("score", workers=(1, config.score.resources))
        options = {
            "num_cpus": config.score.resources.cpus,
            "num_gpus": config.score.resources.gpu_count,
            "runtime_env": {"env_vars": worker_environment(config.score.resources)},
        }
        task = ray.remote(initialise).options(**options)
        problem = ray.get(
            task.remote(
                config.model.model_dump(mode="json"),
                adapter,
                base_path(config.model, run),
                str(target.resolve()),
                config.seed,
            )
        )
        if problem is not None:
            raise UserError(problem)


def require_lora(folder: Path) -> None:
    """Check an adapter directory of the user's.

    Raises:
        UserError: it is missing, holds no safetensors, or another kind of adapter, or one whose rank or scale differs
            between modules.
    """
    settings = folder / "adapter_config.json"
    if not settings.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"adapter.path '{folder}': needs adapter_config.json and adapter_model.safetensors, as PEFT saves them"
        )
    found = json.loads(settings.read_text())
    kind = found.get("peft_type")
    if kind != "LORA":
        raise UserError(f"adapter.path '{folder}': holds a {kind} adapter; only LoRA has elements to score and cut")
    for field in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if found.get(field):
            raise UserError(
                f"adapter.path '{folder}': has {field}; engines serve base + s·BA with one rank and one alpha: give a "
                "plain LoRA"
            )


def initialise(model: dict[str, Any], adapter: dict[str, Any], base: str, target: str, seed: int) -> str | None:
    """Attach an adapter and save it to `target` (a Ray task); returns the message of a user's error."""
    from lorapar_ray.adapters import attach_lora, load_adapter, save_adapter

    settings = AdapterConfig.model_validate(adapter)
    student = load_base(ModelConfig.model_validate(model), base)
    if settings.path is not None:
        save_adapter(load_adapter(student, Path(settings.path)), Path(target))
        return None
    try:
        peft_model = attach_lora(
            student,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            targets=settings.targets,
            init=settings.init,
            seed=seed,
            init_std=settings.init_std,
        )
    except UserError as error:
        return str(error)
    with atomic_path(Path(target)) as draft:
        save_adapter(peft_model, draft)
        if settings.init in RESIDUAL_INITS:
            _save_residual(peft_model, base, draft / "base")  # takes the adapter out of the model: last
    return None


def _save_residual(peft_model: Any, base: str, folder: Path) -> None:
    """The residual base with its tokenizer, as a directory that transformers and vLLM read."""
    from transformers import AutoTokenizer

    from lorapar_ray.adapters import residual_base

    residual_base(peft_model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
