"""What one Ray Train worker does in stage 2: pull its share, take the masked policy-gradient step, publish the policy.

The adapter is small, so gradients are summed over learners with one all-reduce of its active part's parameters instead
of wrapping the model; every rank then takes the same step and holds the same policy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapar_ray.config import GrpoConfig, ModelConfig
from lorapar_ray.engines.policy import Policy, PolicySender
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.batches import Batch, Canary, Clock
from lorapar_ray.grpo.head import TokenScorer
from lorapar_ray.grpo.loss import part_weight, policy_loss, sampler_figures
from lorapar_ray.grpo.memory import PROBE_TOKENS, checkpoint_layers, pass_limits
from lorapar_ray.grpo.packing import PackedRows, group_by_prompt, micro_batches, pack, packed_logprobs, pad
from lorapar_ray.grpo.samples import MiniBatch, Sample
from lorapar_ray.optim.schedule import learning_rate_factor
from lorapar_ray.packed_attention import use_packed_attention
from lorapar_ray.precision import rounding, use_tensor_cores
from lorapar_ray.trackers import Curves
from lorapar_ray.tracking import append_line, keep_lines_until


@dataclass(frozen=True)
class GrpoJob:
    """One GRPO job, JSON-like so that it travels to the learners."""

    model: dict[str, Any]
    settings: dict[str, Any]
    base: str
    adapter_in: str
    adapter_out: str
    regions: str | None
    """`regions.safetensors`, or None to train every element."""
    canaries: list[list[Any]]
    """[token ids, start] of each."""
    checkpoints: str
    metrics: str
    samples: str
    steps: int
    coordinator: str
    """Name of the coordinator actor."""
    run: str
    """Name of the run, for trackers."""
    seed: int

    def payload(self) -> dict[str, Any]:
        return asdict(self)


def learn_worker(payload: dict[str, Any]) -> None:
    """Run the learner loop on this rank; rank 0 writes metrics, checkpoints and the adapter (a Ray Train function)."""
    import ray
    import ray.train

    job = GrpoJob(**payload)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    coordinator = ray.get_actor(job.coordinator)
    learner = Learner(job)
    step, stream = learner.restore(rank, world)
    leads = rank == 0
    canaries = learner.canaries() if leads or learner.sharded else []
    measured = learner.settings.canary_tolerance == "auto"
    base_canaries = learner.base_canaries() if measured and (leads or learner.sharded) else []
    if leads:
        ray.get(coordinator.resume.remote(step, stream))
        keep_lines_until(Path(job.metrics), step)
        keep_lines_until(Path(job.samples), step)
        curves = Curves(learner.settings.report_to, job.run, Path(job.metrics).with_name("tensorboard") / "grpo")
        if measured:
            ray.get(coordinator.calibrate.remote(base_canaries, rounding(learner.model.dtype)))
        ray.get(coordinator.publish.remote(learner.policy(step), canaries))
    while step < job.steps:
        start = time.monotonic()
        if world > 1:
            dist.barrier()  # no rank asks for a batch before rank 0 has published the policy
        batch: Batch = ray.get(coordinator.batch.remote(step, rank, world))
        waited = time.monotonic() - start
        clock = Clock()
        with clock.phase("learn"):
            metrics = learner.step(batch, step, world)
            canaries = learner.canaries() if leads or learner.sharded else []
        step += 1
        if leads:
            published = ray.get(coordinator.publish.remote(learner.policy(step), canaries))
            seconds = time.monotonic() - start
            line = {"step": step, "policy_version": step, **batch.metrics, **metrics, **published}
            line |= {
                "seconds/learn": clock.seconds["learn"],
                "seconds/wait": waited,
                "seconds": seconds,
                "prompts": batch.prompts,
            }
            line |= {"learner_tokens_per_s": batch.tokens / clock.seconds["learn"], "idle/learner": waited / seconds}
            append_line(Path(job.metrics), line)
            for example in batch.examples:
                append_line(Path(job.samples), {"step": step, **example})
            curves.write(line, step)
            if step % learner.settings.checkpoint_every == 0 and step < job.steps:
                learner.save(step, ray.get(coordinator.checkpoint.remote(step - 1)))
    if leads:
        learner.finish()


class Learner:
    """The policy being trained on one rank."""

    def __init__(self, job: GrpoJob) -> None:
        from lorapar_ray.adapters import adapter_parameters, load_adapter
        from lorapar_ray.optim import MaskedAdamW, masked_param_groups
        from lorapar_ray.partition import load_regions, stage_mask
        from lorapar_ray.sharding import shard_base
        from lorapar_ray.student import device, load_base, load_tokenizer

        self.job = job
        self.settings = GrpoConfig.model_validate(job.settings)
        model = ModelConfig.model_validate(job.model)
        torch.manual_seed(job.seed)
        self.sharded = self.settings.sharding == "fsdp2"
        base = load_base(model, job.base, on=torch.device("cpu") if self.sharded else device())
        self.model = load_adapter(base, Path(job.adapter_in), trainable=True)
        if self.sharded:
            shard_base(self.model, device())
        self.model.eval()  # no dropout: the learner's policy is the one that was sampled from
        self.base = self.model.get_base_model()
        self.pad_id = load_tokenizer(job.base, model).pad_token_id
        self.parameters = adapter_parameters(self.model)
        self.device = next(iter(self.parameters.values())).device
        self.reference = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        masks = (
            {key: torch.ones_like(parameter, dtype=torch.bool) for key, parameter in self.parameters.items()}
            if job.regions is None
            else stage_mask(load_regions(Path(job.regions))[0], stage=2)
        )
        config = (Path(job.adapter_in) / "adapter_config.json").read_text()
        self.sender = PolicySender(config, None if job.regions is None else masks)
        settings = self.settings
        self.optimizer = MaskedAdamW(
            masked_param_groups(self.parameters, masks, lr=settings.learning_rate, weight_decay=settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.skipped = 0
        """Updates skipped in a row."""
        use_tensor_cores(self.device, self.model.dtype)
        self.packed = use_packed_attention(self.base)
        self.scorer = TokenScorer(self.model)
        self.pass_tokens = self._limit_passes()

    def _limit_passes(self) -> int:
        """Tokens of one pass; turns checkpointing on where it is asked for or needed."""
        settings = self.settings
        share = settings.learner_resources.gpu_count if self.device.type == "cuda" else 1 / settings.learners
        probe = self._rows([[Sample([5] * PROBE_TOKENS, [5], [0.0], 0.0, finished=True, version=0)]])
        longest = settings.max_prompt_length + settings.max_completion_length
        tokens, checkpointed = pass_limits(
            self.model,
            probe.inputs,
            longest,
            share=min(1.0, share or 1.0),
            checkpointing=settings.gradient_checkpointing,
        )
        if checkpointed:
            checkpoint_layers(self.base)
        return settings.micro_batch_tokens or tokens

    def step(self, batch: Batch, step: int, world: int) -> dict[str, float]:
        """The updates on this rank's share of `batch`; returns their metrics. An empty batch changes nothing.

        Raises:
            UserError: `nonfinite_limit` updates in a row had a loss or gradient that is not finite.
        """
        settings = self.settings
        rate = settings.learning_rate * learning_rate_factor(
            step, self.job.steps, warmup_ratio=settings.warmup_ratio, kind=settings.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if batch.count == 0:
            return {"learning_rate": rate, "loss": 0.0, "grad_norm": 0.0}
        parts = batch.mini_batches or [MiniBatch(batch.samples, batch.tokens, batch.count)]
        updates = [parts[number % len(parts)] for number in range(settings.updates_per_batch or len(parts))]
        old = self._old_logprobs(updates)
        found = [self._update(mini_batch, old, world) for mini_batch in updates]
        metrics = step_metrics([(each, mini_batch.count) for each, mini_batch in zip(found, updates, strict=True)])
        return {**metrics, "learning_rate": rate, "updates": float(len(updates))}

    def _update(self, mini_batch: MiniBatch, old: dict[int, Tensor], world: int) -> dict[str, float]:
        """One optimiser update; skipped, and counted, if its loss or gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=False)
        figures: list[tuple[dict[str, Tensor], int]] = []
        micros = self._micro_batches(mini_batch.samples)
        passes = self._most_passes(len(micros))
        for micro in micros:
            loss, found = self._loss(micro, mini_batch, old)
            loss.backward()
            figures.append(({"loss": loss.detach(), **found}, sum(map(len, micro))))
        self._dummy_passes(passes - len(micros))
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parts = [(as_numbers(each), count) for each, count in figures]
        if world > 1:
            _sum_over_ranks([parameter.grad for parameter in self.parameters.values() if parameter.grad is not None])
            parts = _from_all_ranks(parts, world)
        metrics = {
            **step_metrics(parts),
            "grad_norm": float(self.optimizer.clip_grad_norm_(self.settings.max_grad_norm)),
        }
        if isfinite(metrics["loss"]) and isfinite(metrics["grad_norm"]):
            self.optimizer.step()
            self.skipped = 0
            return {**metrics, "updates_skipped": 0.0}
        self.skipped += 1
        if self.skipped >= self.settings.nonfinite_limit:
            raise UserError(
                f"grpo: the loss or its gradient was not finite in {self.skipped} updates in a row (loss "
                f"{metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}); lower grpo.learning_rate, or look at "
                "the last lines of metrics/grpo.jsonl"
            )
        return {"updates_skipped": 1.0}

    def _micro_batches(self, samples: Sequence[Sample]) -> list[list[list[Sample]]]:
        groups = group_by_prompt(samples) if self.packed else [[sample] for sample in samples]
        return list(micro_batches(groups, self.pass_tokens, self.settings.micro_batch_size))

    def _rows(self, groups: Sequence[Sequence[Sample]]) -> PackedRows:
        if self.packed:
            return pack(groups, self.device)
        return pad([sample for group in groups for sample in group], self.pad_id, self.device)

    @torch.no_grad()
    def _old_logprobs(self, updates: Sequence[MiniBatch]) -> dict[int, Tensor]:
        """Log-probabilities under the policy before the first update, by `id` of the sample.

        Those of the first update's samples are found on the way, in the update itself.
        """
        old: dict[int, Tensor] = {}
        if len(updates) == 1 or self.settings.old_policy == "sampler":
            return old
        first = {id(sample) for sample in updates[0].samples}
        later = {id(sample): sample for update in updates[1:] for sample in update.samples if id(sample) not in first}
        micros = self._micro_batches(list(later.values()))
        passes = self._most_passes(len(micros))
        for micro in micros:
            logprobs_BT, _ = packed_logprobs(self.scorer, self._rows(micro), temperature=self.settings.temperature)
            _remember(old, micro, logprobs_BT)
        self._dummy_passes(passes - len(micros), backward=False)
        return old

    def _most_passes(self, passes: int) -> int:
        """Passes that every rank makes: where the base is cut over the learners, each needs all of them.

        Asked before the first one: within a pass a rank answers nothing but the gathering of weights.
        """
        if not self.sharded:
            return passes
        from lorapar_ray.sharding import most_of_any_rank

        return most_of_any_rank(passes, self.device)

    def _dummy_passes(self, passes: int, backward: bool = True) -> None:
        """Forward and backward passes that change nothing, beside ranks that have more to do."""
        if passes == 0:
            return
        token_ids, start = self.job.canaries[0]
        rows = self._rows([[_canary_sample(token_ids, start)]])
        for _ in range(passes):
            if backward and self.settings.kl_beta > 0:
                with torch.no_grad():
                    packed_logprobs(self.scorer, rows, temperature=1.0)
            with torch.set_grad_enabled(backward):
                logprobs_BT, _ = packed_logprobs(self.scorer, rows, temperature=1.0)
            if backward:
                (logprobs_BT.sum() * 0.0).backward()

    def _loss(
        self, groups: list[list[Sample]], mini_batch: MiniBatch, old: dict[int, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of an update's loss that these samples make, and its figures; notes their old log-probabilities."""
        settings = self.settings
        samples = [sample for group in groups for sample in group]
        rows = self._rows(groups)
        reference_BT = self._reference_logprobs(rows) if settings.kl_beta > 0 else None
        logprobs_BT, entropy_BT = packed_logprobs(self.scorer, rows, temperature=settings.temperature)
        sampler = settings.old_policy == "sampler"
        if not sampler and id(samples[0]) not in old:
            _remember(old, groups, logprobs_BT.detach())
        output = policy_loss(
            logprobs_BT,
            rows.sampling_logprobs_BT if sampler else _recall(old, samples, rows),
            rows.advantages_B,
            rows.mask_BT,
            loss_type=settings.loss,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            max_completion_length=settings.max_completion_length,
            num_tokens_global=mini_batch.tokens,
            ref_logprobs_BT=reference_BT,
            kl_beta=settings.kl_beta,
            sampling_logprobs_BT=None if sampler else rows.sampling_logprobs_BT,
            tis_cap=settings.importance_cap,
            sequence_mask_bounds=settings.sequence_ratio_bounds,
            entropy_BT=entropy_BT,
        )
        figures = output.figures
        if sampler:
            gap_BT = (logprobs_BT.detach() - rows.sampling_logprobs_BT) * rows.mask_BT
            figures = {**figures, **sampler_figures(gap_BT, rows.mask_BT)}
        weight = part_weight(
            settings.loss, len(samples) / mini_batch.count, len(rows.tokens_N) / max(1, mini_batch.tokens)
        )
        return output.loss * weight, figures

    @torch.no_grad()
    def _reference_logprobs(self, rows: PackedRows) -> Tensor:
        """Log-probabilities under the stage 1 adapter, by swapping its values in and out of the same model."""
        current = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        try:
            self._assign(self.reference)
            return packed_logprobs(self.scorer, rows, temperature=self.settings.temperature)[0]
        finally:
            self._assign(current)

    def _assign(self, state: dict[str, Tensor]) -> None:
        for key, parameter in self.parameters.items():
            parameter.data.copy_(state[key])

    @torch.no_grad()
    def canaries(self) -> list[Canary]:
        """The canary tokens with this policy's log-probabilities at temperature 1, as engines score prompts."""
        samples = [_canary_sample(token_ids, start) for token_ids, start in self.job.canaries]
        logprobs_BT, _ = packed_logprobs(self.scorer, self._rows([[sample] for sample in samples]), temperature=1.0)
        return [
            Canary(token_ids, start, found[: len(token_ids) - start].tolist())
            for (token_ids, start), found in zip(self.job.canaries, logprobs_BT, strict=True)
        ]

    def base_canaries(self) -> list[Canary]:
        """The same under the bare base, which engines serve before the first policy."""
        with self.model.disable_adapter():
            return self.canaries()

    def policy(self, version: int) -> Policy:
        """The current adapter, ready to be sent: whole the first time, then what may have changed."""
        return self.sender.policy(version, self.parameters)

    def save(self, step: int, stream: dict[str, Any]) -> None:
        """Checkpoint after `step` steps: adapter, optimiser, RNG, and where the prompts stand."""
        from lorapar_ray.tensortree import save_tree

        tree = {
            "step": step,
            "stream": stream,
            "parameters": {key: parameter.detach() for key, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        save_tree(Path(self.job.checkpoints) / f"step-{step:07d}.safetensors", tree)
        for old in sorted(Path(self.job.checkpoints).glob("step-*.safetensors"))[:-2]:
            old.unlink()

    def restore(self, rank: int, world: int) -> tuple[int, dict[str, Any] | None]:
        """Load the checkpoint that is the newest to rank 0; returns (steps done, prompt stream state)."""
        from lorapar_ray.tensortree import is_whole, load_tree

        found = sorted(Path(self.job.checkpoints).glob("step-*.safetensors")) if rank == 0 else []
        found = [file for file in found if is_whole(file)]  # a cut one: the one before it is there
        if world > 1:  # another node's view of a shared file system may lag behind
            names: list[Any] = [[file.name for file in found]]
            dist.broadcast_object_list(names)
            found = [Path(self.job.checkpoints) / name for name in names[0]]
        if not found:
            return 0, None
        tree = load_tree(found[-1])
        self._assign(tree["parameters"])
        self.optimizer.load_state_dict(tree["optimizer"])
        torch.set_rng_state(tree["rng"])
        return tree["step"], tree["stream"]

    def finish(self) -> None:
        """Write the trained adapter."""
        from lorapar_ray.adapters import save_adapter

        save_adapter(self.model, Path(self.job.adapter_out))


def _canary_sample(token_ids: list[int], start: int) -> Sample:
    own = token_ids[start:]
    return Sample(token_ids[:start], own, [0.0] * len(own), 0.0, finished=True, version=0)


def _remember(old: dict[int, Tensor], groups: Sequence[Sequence[Sample]], logprobs_BT: Tensor) -> None:
    samples = [sample for group in groups for sample in group]
    for sample, found in zip(samples, logprobs_BT, strict=True):
        old[id(sample)] = found[: len(sample.token_ids)]


def _recall(old: dict[int, Tensor], samples: Sequence[Sample], rows: PackedRows) -> Tensor:
    return rows.spread(torch.cat([old[id(sample)] for sample in samples]))


def as_numbers(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars on a device as numbers, fetched at once."""
    return dict(zip(figures, torch.stack([each.float() for each in figures.values()]).tolist(), strict=True))


def step_metrics(parts: list[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Metrics of a step from those of its parts, each with its number of sequences.

    `loss` and `updates_skipped` add up, `..._max` and `..._min` are extremes, the others means over the sequences of
    parts that have them.
    """
    found: dict[str, float] = {}
    for key in {key: None for metrics, _ in parts for key in metrics}:
        values = [(metrics[key], count) for metrics, count in parts if key in metrics]
        if key in ("loss", "updates_skipped"):
            found[key] = sum(value for value, _ in values)
        elif key.endswith(("_max", "_min")):
            found[key] = (max if key.endswith("_max") else min)(value for value, _ in values)
        else:
            found[key] = sum(value * count for value, count in values) / sum(count for _, count in values)
    return found


def _from_all_ranks(parts: list[Any], world: int) -> list[Any]:
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, parts)
    return [part for each in gathered for part in each]


def _sum_over_ranks(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
