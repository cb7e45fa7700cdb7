"""What one Ray Train worker does for several arms of stage 1 on one frozen base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapar_ray.boundary import read_object
from lorapar_ray.config import AdapterConfig, ModelConfig, SftConfig
from lorapar_ray.sft.worker import SftJob, masks_of, optimizer_of, passes_of, prepared, this_worker


def train_arms_worker(payload: dict[str, Any]) -> None:
    """Train every job of `payload["jobs"]`, which share a base; rank 0 writes their adapters (a Ray Train function).

    Raises:
        UserError: an adapter, a region or a checkpoint is damaged or missing; or a job's gradients were not finite,
            raised once the adapters of the others are written.
    """
    import torch

    from lorapar_ray.adapters.many import load_many
    from lorapar_ray.adapters.store import write_adapter_state
    from lorapar_ray.sft.arm import Arm
    from lorapar_ray.sft.arms_loop import ArmsLoop
    from lorapar_ray.student import load_base, load_tokenizer

    jobs = [SftJob(**each) for each in payload["jobs"]]
    every = [SftConfig.model_validate(job.settings) for job in jobs]
    first, worker = jobs[0], this_worker()
    folders = [Path(job.adapter_in) for job in jobs]
    model_config = ModelConfig.model_validate(first.model)
    model = load_many(
        load_base(model_config, first.base),
        folders,
        dropout=AdapterConfig.model_validate(first.adapter).dropout,
        device=worker.device,
    )
    torch.manual_seed(worker.seed(first.seed))
    masks = [masks_of(job, model.parameters_of(number)) for number, job in enumerate(jobs)]
    works = [prepared(job, own, mask, worker) for job, own, mask in zip(jobs, every, masks, strict=True)]
    tokens = sum(work.tokens for work in works) / worker.world
    passes = passes_of(first, every[0], model, model.stacks(), tokens, worker.device, arms=len(jobs))
    model.share_gradients()
    arms = [
        Arm(
            model.named_parameters_of(number),
            optimizer_of(own, model.parameters_of(number), masks[number]),
            settings=own,
            plan=work.plan,
            examples=work.examples,
            validates=bool(work.validation),
            worker=worker,
            checkpoints=Path(job.checkpoints),
            log=work.log,
        )
        for number, (job, own, work) in enumerate(zip(jobs, every, works, strict=True))
    ]
    ArmsLoop(
        model,
        arms,
        passes,
        validation=[work.validation for work in works],
        packed=every[0].packing,
        filler=load_tokenizer(first.base, model_config).eos_token_id,
        worker=worker,
    ).run([work.resume_from for work in works])
    if worker.rank == 0:
        finite = [number for number, arm in enumerate(arms) if arm.log.failure is None]
        for number in finite:
            job = jobs[number]
            config = read_object(folders[number] / "adapter_config.json")
            write_adapter_state(Path(job.adapter_out), config, model.state_of(number))
        for arm in arms:
            arm.require_finite()
