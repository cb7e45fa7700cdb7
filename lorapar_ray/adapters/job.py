"""Make the adapter of a run, as a task on a machine that can hold the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapar_ray.adapters.given import require_lora, take_over
from lorapar_ray.boundary import boundary
from lorapar_ray.capacity import needing
from lorapar_ray.config import AdapterConfig, Config, ModelConfig
from lorapar_ray.files import atomic_path, expanded
from lorapar_ray.models import resolve_model
from lorapar_ray.runs import RunDirectory
from lorapar_ray.student import RESIDUAL_INITS, base_reference, load_base
from lorapar_ray.workers import on_a_worker


def make_adapter(config: Config, run: RunDirectory, target: Path) -> None:
    """Attach the config's adapter to the student and save it to `target`, on a machine with `score.resources`.

    Raises:
        UserError: the model has none of the target modules, or `adapter.path` holds no LoRA adapter.
    """
    adapter = config.adapter.model_dump(mode="json")
    if config.adapter.path is not None:
        given = expanded(config.adapter.path, "adapter.path").resolve()
        require_lora(given)
        adapter["path"] = str(given)

    if not (target / "adapter_config.json").is_file():
        with needing("score", {"workers": (1, config.score.resources)}):
            on_a_worker(
                initialise,
                config.model.model_dump(mode="json"),
                adapter,
                base_reference(config.model, run),
                str(target),
                config.seed,
                resources=config.score.resources,
                run=run,
                writes=[target],
            )


def initialise(model_fields: dict[str, Any], adapter: dict[str, Any], base: str, folder: str, seed: int) -> None:
    """Attach an adapter and save it to `folder` (a Ray task)."""
    from lorapar_ray.adapters import attach_lora, save_adapter

    model, settings = ModelConfig.model_validate(model_fields), AdapterConfig.model_validate(adapter)
    target, student = Path(folder), load_base(model, base)
    if settings.path is not None:
        take_over(student, Path(settings.path), target, model.path)
        return
    with boundary("adapter: PEFT cannot attach it with these settings", "check adapter.rank, init and targets"):
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
    with atomic_path(target) as draft:
        save_adapter(peft_model, draft)
        if settings.init in RESIDUAL_INITS:
            _save_residual(peft_model, base, draft / "base")  # takes the adapter out of the model: last


def _save_residual(peft_model: Any, base: str, folder: Path) -> None:
    """The residual base with its tokenizer, as a directory that transformers and vLLM read."""
    from transformers import AutoTokenizer

    from lorapar_ray.adapters import residual_base

    residual_base(peft_model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model(base)).save_pretrained(folder)
