"""The training loop of stage 1 on one worker.

The plan (`batches`) says which rows each step sees. The loss of a step is a sum over its response tokens divided by
their number, so how rows are spread over micro-batches and workers changes rounding only. The adapter is whole on every
worker: gradients are summed by one all-reduce a step, then every worker takes the same step. Nothing in a step waits
for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorapar_ray.config import SftConfig
from lorapar_ray.optim import MaskedAdamW
from lorapar_ray.optim.schedule import learning_rate_factor
from lorapar_ray.sft.batches import BatchPlan
from lorapar_ray.sft.checkpoint import Progress, load_checkpoint, load_parameters, save_checkpoint
from lorapar_ray.sft.loss import mean_loss
from lorapar_ray.sft.passes import Passes
from lorapar_ray.sft.rows import Rows, collate, losses_in
from lorapar_ray.sft.step_log import StepLog
from lorapar_ray.sharding import sum_over_ranks

Example = dict[str, Any]


@dataclass(frozen=True)
class Worker:
    """This worker among all."""

    rank: int
    world: int
    device: torch.device


class TrainingLoop:
    """A run of stage 1, from a checkpoint or from the start to its last step."""

    def __init__(
        self,
        model: Any,
        optimizer: MaskedAdamW,
        passes: Passes,
        *,
        settings: SftConfig,
        plan: BatchPlan,
        examples: Sequence[Example],
        validation: Sequence[Rows],
        filler: int,
        worker: Worker,
        checkpoints: Path | None,
        log: StepLog,
    ) -> None:
        """Take what to train and how.

        Args:
            model: whose trainable parameters the optimiser holds, at the rates of the schedule's peak.
            examples: {input_ids, response_start}, which `plan` numbers.
            validation: this worker's micro-batches, as many as every other worker's; empty: none.
            filler: the token to fill up rows with.
            checkpoints: directory for them; None: none are kept.
        """
        self.model, self.optimizer, self.passes = model, optimizer, passes
        self.settings, self.plan, self.examples, self.validation = settings, plan, examples, validation
        self.filler, self.worker, self.checkpoints, self.log = filler, worker, checkpoints, log
        self.trained: dict[str, nn.Parameter] = {
            key: value for key, value in model.named_parameters() if value.requires_grad
        }
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.progress = Progress()
        self.buckets = worker.device.type == "cuda"

    def run(self, resume_from: str | None) -> None:
        """Train to the last step, or until patience is at its end."""
        if resume_from is not None:
            self.progress = load_checkpoint(Path(resume_from), self.worker.rank, self.trained, self.optimizer)
        elif self.worker.world > 1:
            self._start_alike()
        self.model.train()
        self.log.leave_out()
        while self.progress.step < self.plan.steps and not self._out_of_patience():
            self._step(self.progress.step)
            self.progress.step += 1
            self._after_a_step()
        self.log.flush()
        best = self.progress.best_checkpoint
        if self.settings.keep == "best" and best is not None:
            load_parameters(Path(best), self.trained)

    def _step(self, step: int) -> None:
        settings = self.settings
        factor = learning_rate_factor(step, self.plan.steps, warmup_ratio=settings.warmup_ratio, kind=settings.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        micros = self._micro_batches(step)
        everyone = [example for micro in micros for row in micro for example in row]
        self.passes.begin(losses_in(everyone))
        for micro in micros[self.worker.rank :: self.worker.world]:
            self.passes.add(collate(micro, packed=settings.packing, filler=self.filler, buckets=self.buckets))
        loss = self.passes.loss()
        if self.worker.world > 1:
            loss = self._sum_over_workers(loss)
        norm = self.optimizer.clip_and_step(settings.max_grad_norm)
        tokens = sum(len(example["input_ids"]) for example in everyone)
        self.log.put(step + 1, loss, norm, self.optimizer.param_groups[0]["lr"], tokens)

    def _micro_batches(self, step: int) -> list[list[list[Example]]]:
        """The step's micro-batches, as rows of examples; worker r takes number r, r + world, …"""
        plan = self.plan
        count = plan.accumulation * self.worker.world
        start = step * count * plan.micro_batch
        rows = [[self.examples[each] for each in row] for row in plan.rows[start : start + count * plan.micro_batch]]
        return [rows[k * plan.micro_batch : (k + 1) * plan.micro_batch] for k in range(count)]

    def _after_a_step(self) -> None:
        settings, progress = self.settings, self.progress
        last = progress.step >= self.plan.steps
        every = settings.validate_every if self.validation else settings.checkpoint_every
        due = last or progress.step % every == 0
        if due and self.validation:
            self.log.flush()
            self.model.eval()
            loss = mean_loss(self.model, list(self.validation), self.worker.device, over_ranks=self.worker.world > 1)
            self.model.train()
            self.log.validated(progress.step, loss)
            if progress.heard(loss) and self.checkpoints is not None:
                progress.best_checkpoint = str(self.checkpoints / f"checkpoint-{progress.step}")
        if due and self.checkpoints is not None:
            self.log.flush()  # a run that goes on from here writes no line for the steps before
            worker = self.worker
            save_checkpoint(self.checkpoints, worker.rank, worker.world, progress, self.trained, self.optimizer)

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.waited >= patience

    @torch.no_grad()
    def _sum_over_workers(self, loss: Tensor) -> Tensor:
        """Sum gradients and loss, together; returns the loss."""
        parameters = list(self.trained.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        total = loss.clone()
        sum_over_ranks([*(parameter.grad for parameter in parameters if parameter.grad is not None), total])
        return total

    @torch.no_grad()
    def _start_alike(self) -> None:
        """Give every worker rank 0's parameters."""
        for parameter in self.trained.values():
            dist.broadcast(parameter.data, src=0)
