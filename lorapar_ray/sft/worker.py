"""What one Ray Train worker does in supervised fine-tuning: TRL's trainer around our optimiser.

Left to TRL: batching, DDP, schedule, gradient accumulation, checkpoints with data order and RNG. Ours: which elements
train (`MaskedAdamW`), clipping that sees those only, and the metrics line per step.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorapar_ray.config import ModelConfig, SftConfig


@dataclass(frozen=True)
class SftJob:
    """One fine-tuning job, JSON-like so that it travels to the workers."""

    model: dict[str, Any]
    settings: dict[str, Any]
    base: str
    adapter_in: str
    adapter_out: str
    examples: str
    """JSON file: list of {input_ids, response_start}."""
    regions: str | None
    """`regions.safetensors`, or None to train every element."""
    checkpoints: str
    metrics: str
    workers: int
    seed: int

    def payload(self) -> dict[str, Any]:
        return asdict(self)


def steps_in(settings: SftConfig, examples: int, workers: int) -> int:
    """Optimiser steps of a job, as TRL's trainer counts them."""
    if settings.max_steps is not None:
        return settings.max_steps
    per_worker = -(-examples // workers)
    micro = -(-per_worker // micro_batch(settings, workers))
    per_epoch = max(1, -(-micro // accumulation(settings, workers)))
    return max(1, -int(-settings.epochs * per_epoch // 1))


def micro_batch(settings: SftConfig, workers: int) -> int:
    """Examples per forward pass on one worker."""
    return max(1, min(settings.micro_batch_size, settings.batch_size // workers))


def accumulation(settings: SftConfig, workers: int) -> int:
    """Forward passes per optimiser step."""
    return max(1, settings.batch_size // (workers * micro_batch(settings, workers)))


def train_worker(payload: dict[str, Any]) -> None:
    """Train on this worker's share; rank 0 writes the adapter (a Ray Train function)."""
    import torch
    from trl import SFTTrainer

    from lorapar_ray.adapters import adapter_parameters, load_adapter, save_adapter
    from lorapar_ray.datasets.chat import load_encoder
    from lorapar_ray.optim import MaskedAdamW, masked_param_groups
    from lorapar_ray.partition import load_regions, stage_mask
    from lorapar_ray.student import load_base

    job = SftJob(**payload)
    settings = SftConfig.model_validate(job.settings)
    model_config = ModelConfig.model_validate(job.model)
    torch.manual_seed(job.seed)
    model = load_adapter(load_base(model_config, job.base), Path(job.adapter_in), trainable=True)
    tokenizer = load_encoder(job.base, None, model_config.trust_remote_code).tokenizer
    parameters = adapter_parameters(model)
    masks = (
        {key: torch.ones_like(parameter, dtype=torch.bool) for key, parameter in parameters.items()}
        if job.regions is None
        else stage_mask(load_regions(Path(job.regions))[0], stage=1)
    )
    optimizer = MaskedAdamW(
        masked_param_groups(
            parameters,
            masks,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            lora_plus_ratio=settings.lora_plus_ratio,
        ),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    recorder = _recorder(job, optimizer, masks, settings.max_grad_norm)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(job, settings),
        train_dataset=_dataset(job.examples),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[recorder],
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(Path(job.checkpoints)))
    if trainer.is_world_process_zero():
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), Path(job.adapter_out))


def _arguments(job: SftJob, settings: SftConfig) -> Any:
    import torch
    from trl import SFTConfig as TrlConfig

    return TrlConfig(
        output_dir=job.checkpoints,
        per_device_train_batch_size=micro_batch(settings, job.workers),
        gradient_accumulation_steps=accumulation(settings, job.workers),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        max_grad_norm=0.0,  # ours clips the active elements only, right before the step
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=settings.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        seed=job.seed,
        data_seed=job.seed,
        bf16=False,  # the base already is in the dtype the config names; the adapter stays in float32
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=list(settings.report_to) or "none",
        remove_unused_columns=False,
    )


def _dataset(path: str) -> Any:
    from datasets import Dataset

    examples = json.loads(Path(path).read_text())
    return Dataset.from_list(
        [
            {
                "input_ids": example["input_ids"],
                "labels": [-100] * example["response_start"] + example["input_ids"][example["response_start"] :],
            }
            for example in examples
        ]
    )


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end (the trainer writes its state file last)."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if found else None


def _recorder(job: SftJob, optimizer: Any, masks: dict[str, Any], max_grad_norm: float) -> Any:
    """A trainer callback: clips the active gradient before each step, and writes one metrics line after it."""
    from transformers import TrainerCallback

    from lorapar_ray.optim import trainable_share

    share = trainable_share(masks)

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.grad_norm = 0.0
            self.tokens = 0.0
            self.clock = time.monotonic()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                _keep_lines_until(Path(job.metrics), state.global_step)
            self.clock = time.monotonic()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.grad_norm = float(optimizer.clip_grad_norm_(max_grad_norm))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if not state.is_world_process_zero or "loss" not in logs:
                return
            now = time.monotonic()
            seconds, self.clock = now - self.clock, now
            tokens, self.tokens = logs.get("num_tokens", self.tokens) - self.tokens, logs.get("num_tokens", self.tokens)
            line = {
                "step": state.global_step,
                "loss": float(logs["loss"]),
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": self.grad_norm,
                "tokens_per_s": tokens / seconds if seconds > 0 else None,
                "active_share": share,
                "seconds": seconds,
            }
            with Path(job.metrics).open("a") as file:
                file.write(json.dumps(line) + "\n")

    return Recorder()


def _keep_lines_until(metrics: Path, step: int) -> None:
    """Drop the lines of steps that a restart from a checkpoint will do again."""
    metrics.parent.mkdir(parents=True, exist_ok=True)
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    metrics.write_text("".join(line + "\n" for line in kept))
