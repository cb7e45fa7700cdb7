"""Make the adapter of a run, as a task on a machine that can hold the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapar_ray.config import AdapterConfig, Config, ModelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory, atomic_path
from lorapar_ray.student import RESIDUAL_INITS, base_path, load_base
from lorapar_ray.workers import require, worker_environment


def make_adapter(config: Config, run: RunDirectory, target: Path) -> None:
    """Attach a fresh adapter to the student and save it to `target`, on a machine with `score.resources`.

    Raises:
        UserError: the model has none of the target modules.
    """
    import ray

    if not (target / "adapter_config.json").is_file():
        require("score", 1, config.score.resources)
        options = {
            "num_cpus": config.score.resources.cpus,
            "num_gpus": config.score.resources.gpus,
            "runtime_env": {"env_vars": worker_environment(config.score.resources)},
        }
        task = ray.remote(_initialise).options(**options)
        problem = ray.get(
            task.remote(
                config.model.model_dump(mode="json"),
                config.adapter.model_dump(mode="json"),
                base_path(config.model, run),
                str(target.resolve()),
                config.seed,
            )
        )
        if problem is not None:
            raise UserError(problem)


def _initialise(model: dict[str, Any], adapter: dict[str, Any], base: str, target: str, seed: int) -> str | None:
    """Attach a fresh adapter and save it to `target` (a Ray task); returns the message of a user's error."""
    from lorapar_ray.adapters import attach_lora, save_adapter

    settings = AdapterConfig.model_validate(adapter)
    try:
        peft_model = attach_lora(
            load_base(ModelConfig.model_validate(model), base),
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
    if settings.init in RESIDUAL_INITS:
        with atomic_path(Path(target) / "base") as draft:
            _save_residual(peft_model, base, draft)
    save_adapter(peft_model, Path(target))
    return None


def _save_residual(peft_model: Any, base: str, draft: Path) -> None:
    """The residual base with its tokenizer, as a directory that transformers and vLLM read."""
    from transformers import AutoTokenizer

    from lorapar_ray.adapters import residual_base

    residual_base(peft_model).save_pretrained(draft)
    AutoTokenizer.from_pretrained(base).save_pretrained(draft)
