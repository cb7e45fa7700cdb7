"""What one Ray Train worker does in supervised fine-tuning: the model, our optimiser and the trainer, put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from lorapar_ray.config import AdapterConfig, ModelConfig, SftConfig
from lorapar_ray.datasets.chat import NO_LOSS
from lorapar_ray.sft.batches import BatchPlan, deal, lay_out, plan_batches


@dataclass(frozen=True)
class SftJob:
    """One fine-tuning job, JSON-like so that it travels to the workers."""

    name: str
    model: dict[str, Any]
    adapter: dict[str, Any]
    settings: dict[str, Any]
    base: str
    adapter_in: str
    """The LoRA to start from; other methods start fresh from the seed."""
    adapter_out: str
    examples: str
    """JSON file: {train, validation}, lists of {input_ids, response_start}."""
    regions: str | None
    """`regions.safetensors`, or None to train every element."""
    checkpoints: str
    metrics: str
    workers: int
    seed: int

    def payload(self) -> dict[str, Any]:
        return asdict(self)


def train_worker(payload: dict[str, Any]) -> None:
    """Train on this worker's share; rank 0 writes the adapter (a Ray Train function)."""
    import ray.train
    import torch

    from lorapar_ray.adapters import save_adapter, save_method
    from lorapar_ray.optim import trainable_share
    from lorapar_ray.sft.checkpoint import last_checkpoint
    from lorapar_ray.sft.tracking import keep_lines_until, point_trackers
    from lorapar_ray.sft.trainer import Stage1Trainer, ValidateAtTheEnd
    from lorapar_ray.student import load_tokenizer

    job = SftJob(**payload)
    settings = SftConfig.model_validate(job.settings)
    rank, metrics = ray.train.get_context().get_world_rank(), Path(job.metrics)
    point_trackers(metrics.with_name("tensorboard") / job.name)
    torch.manual_seed(job.seed)
    model = _load(job, settings)
    parameters, masks = _active(job, model)
    tokenizer = load_tokenizer(job.base, ModelConfig.model_validate(job.model))
    examples = json.loads(Path(job.examples).read_text())
    plan = plan_batches([len(each["input_ids"]) for each in examples["train"]], settings, job.workers, job.seed)
    before = {key: parameter.data for key, parameter in parameters.items()}
    trainer = Stage1Trainer(
        metrics=metrics,
        active_share=trainable_share(masks),
        validation=_validation(examples["validation"], settings, job.workers, rank, tokenizer.eos_token_id),
        model=model,
        args=_arguments(job, settings, plan),
        train_dataset=_dataset(examples["train"], plan, settings.packing, tokenizer.eos_token_id),
        eval_dataset=_never_read() if examples["validation"] else None,
        processing_class=tokenizer,
        optimizers=(_optimizer(settings, parameters, masks), None),
        callbacks=[ValidateAtTheEnd(), *_early_stopping(settings)] if examples["validation"] else [],
    )
    for key, parameter in parameters.items():
        parameter.data = before[key]  # over a 4-bit base TRL rounds the adapter to bfloat16; ours stays in float32
    found = last_checkpoint(Path(job.checkpoints), job.workers)
    if rank == 0:
        for file in (metrics, metrics.with_name(f"{metrics.stem}_validation.jsonl")):
            keep_lines_until(file, 0 if found is None else found[1])
    trainer.train(resume_from_checkpoint=None if found is None else found[0])
    if rank == 0:
        trained = trainer.accelerator.unwrap_model(trainer.model)
        (save_adapter if job.adapter["method"] == "lora" else save_method)(trained, Path(job.adapter_out))


def _load(job: SftJob, settings: SftConfig) -> Any:
    """The student with the adapter that trains."""
    import torch

    from lorapar_ray.adapters import attach_method, load_adapter
    from lorapar_ray.sharding import shard_base
    from lorapar_ray.student import device, load_base

    adapter = AdapterConfig.model_validate(job.adapter)
    sharded = settings.sharding == "fsdp2"
    base = load_base(ModelConfig.model_validate(job.model), job.base, on=torch.device("cpu") if sharded else device())
    if adapter.method != "lora":
        return attach_method(base, adapter.method, virtual_tokens=adapter.virtual_tokens, seed=job.seed)
    model = load_adapter(base, Path(job.adapter_in), trainable=True)
    if sharded:
        shard_base(model, device())
        # transformers' word for a model that owns its placement: no DDP around it, no second sharding
        model.is_distributed_loading_by_transformers = True
    return model


def _active(job: SftJob, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, masks) by name: LoRA's A and B under a stage's region, or whatever the method trains, whole."""
    import torch

    from lorapar_ray.adapters import adapter_parameters
    from lorapar_ray.partition import load_regions, stage_mask

    if job.adapter["method"] == "lora":
        parameters = adapter_parameters(model)
    else:
        parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    if job.regions is not None:
        return parameters, stage_mask(load_regions(Path(job.regions))[0], stage=1)
    return parameters, {key: torch.ones(value.shape, dtype=torch.bool) for key, value in parameters.items()}


def _optimizer(settings: SftConfig, parameters: dict[str, Any], masks: dict[str, Any]) -> Any:
    from lorapar_ray.optim import MaskedAdamW, masked_param_groups

    groups = masked_param_groups(
        parameters,
        masks,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lora_plus_ratio=settings.lora_plus_ratio,
    )
    return MaskedAdamW(groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)


def _arguments(job: SftJob, settings: SftConfig, plan: BatchPlan) -> Any:
    import torch
    from trl import SFTConfig as TrlConfig

    validated = settings.validation > 0
    every = settings.validate_every if validated else settings.checkpoint_every
    return TrlConfig(
        output_dir=job.checkpoints,
        run_name=job.name,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        train_sampling_strategy="sequential",  # the plan has shuffled already
        max_steps=plan.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        packing=settings.packing,
        max_length=settings.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        eval_strategy="steps" if validated else "no",
        eval_steps=every if validated else None,
        metric_for_best_model="loss" if validated else None,
        greater_is_better=False if validated else None,
        load_best_model_at_end=validated and settings.keep == "best",
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


def _dataset(examples: list[dict[str, Any]], plan: BatchPlan, packing: bool, filler: int) -> Any:
    from datasets import Dataset

    distinct = list(dict.fromkeys(plan.rows))
    position = {row: number for number, row in enumerate(distinct)}
    table = Dataset.from_list([_row([examples[each] for each in row], packing, filler) for row in distinct])
    return table.select([position[row] for row in plan.rows])


def _row(examples: list[dict[str, Any]], packing: bool, filler: int) -> dict[str, Any]:
    """Examples end to end; with none, two tokens without a loss, to keep a worker in step with the others."""
    if not examples:
        examples = [{"input_ids": [filler, filler], "response_start": 2}]
    ids = [example["input_ids"] for example in examples]
    starts = [example["response_start"] for example in examples]
    row = {
        "input_ids": [token for each in ids for token in each],
        "labels": [
            token for each, start in zip(ids, starts, strict=True) for token in [NO_LOSS] * start + each[start:]
        ],
    }
    return row | ({"seq_lengths": [len(each) for each in ids]} if packing else {})


def _validation(
    examples: Sequence[dict[str, Any]], settings: SftConfig, workers: int, rank: int, filler: int
) -> list[list[dict[str, Any]]]:
    """This worker's micro-batches of the validation rows; every worker has as many."""
    lengths = [len(example["input_ids"]) for example in examples]
    rows = lay_out(range(len(examples)), lengths, settings.max_length if settings.packing else None)
    size = settings.micro_batch_size
    count = workers * ceil(len(rows) / (workers * size))
    dealt = deal(rows, count, size)
    return [
        [_row([examples[each] for each in row], settings.packing, filler) for row in dealt[k * size : (k + 1) * size]]
        for k in range(rank, count, workers)
    ]


def _never_read() -> Any:
    """The trainer wants to see that there is a validation set before it validates; it measures on its own rows."""
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": [0], "labels": [NO_LOSS]}])


def _early_stopping(settings: SftConfig) -> list[Any]:
    from transformers import EarlyStoppingCallback

    return [] if settings.patience is None else [EarlyStoppingCallback(early_stopping_patience=settings.patience)]
