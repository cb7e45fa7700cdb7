"""A Ray Train worker of supervised fine-tuning: builds model and optimiser, and runs the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorapar_ray.config import AdapterConfig, ModelConfig, SftConfig
from lorapar_ray.datasets.tokens import Examples, Selection, TokenTable
from lorapar_ray.sft.batches import BatchPlan, deal, lay_out, plan_batches, split_validation

if TYPE_CHECKING:
    from lorapar_ray.sft.arm import Micro, Worker
    from lorapar_ray.sft.passes import Passes
    from lorapar_ray.sft.step_log import StepLog

COMPILE_FROM = 2e18
"""Compile only jobs with at least this many floating-point operations per worker; compiling takes a minute."""


@dataclass(frozen=True)
class SftJob:
    """One fine-tuning job, JSON-like so that it can be sent to the workers."""

    name: str
    model: dict[str, Any]
    adapter: dict[str, Any]
    settings: dict[str, Any]
    base: str
    adapter_in: str
    """The LoRA to start from; other methods start fresh from the seed."""
    adapter_out: str
    examples: dict[str, Any]
    """The fields of a `datasets.tokens.Selection`: what to train on, the validation split included."""
    regions: str | None
    """A file of regions, or None to train every element."""
    checkpoints: str
    metrics: str
    seed: int
    systems: list[int] | None = None
    """The Systems whose regions train, from `systems.safetensors`; None: stage 1's, from `regions.safetensors`."""

    def payload(self) -> dict[str, Any]:
        return asdict(self)


def train_worker(payload: dict[str, Any]) -> None:
    """Train on this worker's share; rank 0 writes the adapter (a Ray Train function)."""
    import torch

    from lorapar_ray.adapters import save_adapter, save_method
    from lorapar_ray.sft.loop import TrainingLoop
    from lorapar_ray.sft.rows import collate
    from lorapar_ray.student import load_tokenizer

    job = SftJob(**payload)
    settings = SftConfig.model_validate(job.settings)
    worker = this_worker()
    model = _load(job, settings)
    torch.manual_seed(worker.seed(job.seed))
    parameters, masks = _active(job, model)
    filler = load_tokenizer(job.base, ModelConfig.model_validate(job.model)).eos_token_id
    work = prepared(job, settings, masks, worker)
    loop = TrainingLoop(
        model,
        optimizer_of(settings, parameters, masks),
        passes_of(job, settings, model, list(parameters.values()), work.tokens / worker.world, worker.device),
        settings=settings,
        plan=work.plan,
        examples=work.examples,
        validation=[collate(micro, packed=settings.packing, filler=filler) for micro in work.validation],
        filler=filler,
        worker=worker,
        checkpoints=Path(job.checkpoints),
        log=work.log,
    )
    loop.run(work.resume_from)
    if worker.rank == 0:
        (save_adapter if job.adapter["method"] == "lora" else save_method)(model, Path(job.adapter_out))


def this_worker() -> Worker:
    """This process among those of its Ray Train group."""
    import ray.train

    from lorapar_ray.sft.arm import Worker
    from lorapar_ray.student import device

    context = ray.train.get_context()
    return Worker(context.get_world_rank(), context.get_world_size(), device())


@dataclass(frozen=True)
class Prepared:
    """A job's data, without the model."""

    plan: BatchPlan
    examples: Examples
    validation: list[Micro]
    """This worker's micro-batches; every other worker has as many."""
    tokens: int
    """Of all steps, over all workers."""
    log: StepLog
    resume_from: str | None
    """A checkpoint to resume from."""


def prepared(job: SftJob, settings: SftConfig, masks: dict[str, Any], worker: Worker) -> Prepared:
    """Read a job's data and its progress; log lines of steps that will be repeated are removed.

    Every rank calls this for the same jobs in the same order.

    Raises:
        UserError: this rank does not get to see the checkpoint that rank 0 resumes from.
    """
    from lorapar_ray.optim import trainable_share
    from lorapar_ray.sft.checkpoint import common_checkpoint
    from lorapar_ray.sft.step_log import StepLog
    from lorapar_ray.trackers import Curves
    from lorapar_ray.tracking import keep_lines_until

    leads, metrics = worker.rank == 0, Path(job.metrics)
    train, held_out = _examples(job, settings)
    lengths = train.lengths
    plan = plan_batches(lengths, settings, worker.world, job.seed)
    found = common_checkpoint(Path(job.checkpoints), worker.rank, worker.world)
    if leads:
        for file in (metrics, metrics.with_name(f"{metrics.stem}_validation.jsonl")):
            keep_lines_until(file, 0 if found is None else found[1])
    folder = metrics.with_name("tensorboard") / job.name
    curves = Curves(settings.report_to, job.name, folder, "sft", metrics).write if leads else None
    return Prepared(
        plan,
        train,
        _validation(held_out, settings, worker.world, worker.rank),
        sum(lengths[each] for row in plan.rows for each in row),
        StepLog(
            metrics if leads else None,
            curves,
            trainable_share(masks),
            nonfinite_limit=settings.nonfinite_limit,
            name=job.name,
            rate="adapter.warmup_learning_rate" if metrics.stem == "warmup" else "sft.learning_rate",
        ),
        None if found is None else found[0],
    )


def _examples(job: SftJob, settings: SftConfig) -> tuple[Examples, Examples]:
    """What to train and to validate on."""
    selection = Selection(**job.examples)
    table = TokenTable(Path(selection.path))
    positions = selection.positions(table)
    return tuple(  # type: ignore[return-value]
        Examples(table, positions[np.asarray(part, dtype=np.int64)], selection.max_length)
        for part in split_validation(len(positions), settings.validation, job.seed)
    )


def passes_of(
    job: SftJob,
    settings: SftConfig,
    model: Any,
    parameters: Sequence[Any],
    tokens: float,
    device: Any,
    arms: int | None = None,
) -> Passes:
    """Choose how forward and backward run, and prepare the model for it.

    Args:
        tokens: of a worker's whole job.
        arms: adapters that train together; None: one.
    """
    import torch

    from lorapar_ray.sft.passes import EagerPasses, GraphPasses, compile_layers

    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if device.type != "cuda":
        return EagerPasses(model, parameters, device, arms)
    if next(model.get_base_model().parameters()).dtype != torch.float32:
        torch.backends.cuda.matmul.allow_tf32 = True  # the adapter's products alone: the base's are bfloat16
    graphs = not settings.gradient_checkpointing and settings.sharding == "none" and job.model["quantization"] is None
    chosen = settings.acceleration
    if chosen == "auto":
        work = 6.0 * sum(parameter.numel() for parameter in model.parameters()) * tokens
        chosen = "graphs" if work < COMPILE_FROM else "compile"
    if chosen == "compile" and arms is not None:
        chosen = "graphs"  # a compiled layer would be compiled again for each number of tokens
    if not graphs or chosen == "none":
        return EagerPasses(model, parameters, device, arms)
    if chosen == "compile":
        compile_layers(model)
    return GraphPasses(model, parameters, device, arms)


def _load(job: SftJob, settings: SftConfig) -> Any:
    """The student with the adapter that trains."""
    from lorapar_ray.adapters import attach_method
    from lorapar_ray.sharding import load_student
    from lorapar_ray.student import device, load_base

    adapter, model = AdapterConfig.model_validate(job.adapter), ModelConfig.model_validate(job.model)
    if adapter.method != "lora":
        base = load_base(model, job.base, on=device())
        return attach_method(base, adapter.method, virtual_tokens=adapter.virtual_tokens, seed=job.seed)
    return load_student(model, job.base, Path(job.adapter_in), settings.sharding)


def _active(job: SftJob, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, masks) by name: LoRA's A and B under a stage's region, or all that another method trains."""
    from lorapar_ray.adapters import adapter_parameters

    if job.adapter["method"] == "lora":
        parameters = adapter_parameters(model)
    else:
        parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    return parameters, masks_of(job, parameters)


def masks_of(job: SftJob, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """By name, which elements train: those of stage 1's region or of some Systems' regions, or all."""
    import torch

    from lorapar_ray.partition import load_regions, stage_mask
    from lorapar_ray.partition.systems import mask_of_systems

    if job.regions is not None and job.systems is not None:
        return mask_of_systems(Path(job.regions), job.systems)
    if job.regions is not None:
        return stage_mask(load_regions(Path(job.regions))[0], stage=1)
    return {key: torch.ones(value.shape, dtype=torch.bool) for key, value in parameters.items()}


def optimizer_of(settings: SftConfig, parameters: dict[str, Any], masks: dict[str, Any]) -> Any:
    from lorapar_ray.optim import MaskedAdamW, masked_param_groups

    groups = masked_param_groups(
        parameters,
        masks,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lora_plus_ratio=settings.lora_plus_ratio,
    )
    return MaskedAdamW(groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)


def _validation(examples: Examples, settings: SftConfig, workers: int, rank: int) -> list[Micro]:
    """This worker's micro-batches of the validation rows; every worker has as many."""
    lengths = examples.lengths
    rows = lay_out(range(len(examples)), lengths, settings.max_length if settings.packing else None)
    size = settings.micro_batch_size
    count = workers * ceil(len(rows) / (workers * size))
    dealt = [[examples[each] for each in row] for row in deal(rows, count, size)]
    return [dealt[k * size : (k + 1) * size] for k in range(rank, count, workers)]
