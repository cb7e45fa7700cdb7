"""The training loop of stage 1 on one worker.

The plan (`batches`) says which rows each step sees. The loss of a step is a sum over its response tokens divided by
their number, so the distribution of rows over micro-batches and workers changes only rounding. Every worker has the
whole adapter: one all-reduce per step sums the gradients, then every worker takes the same step. Nothing in a step
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorapar_ray.collectives import sum_over_ranks
from lorapar_ray.config import SftConfig
from lorapar_ray.optim import MaskedAdamW
from lorapar_ray.sft.arm import Arm, Example, Micro, Worker
from lorapar_ray.sft.batches import BatchPlan
from lorapar_ray.sft.loss import mean_loss
from lorapar_ray.sft.passes import Passes
from lorapar_ray.sft.rows import Rows, collate
from lorapar_ray.sft.step_log import StepLog


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
        """Store what to train and how.

        Args:
            model: whose trainable parameters the optimiser holds, at the rates of the schedule's peak.
            examples: {input_ids, response_start}, which `plan` numbers.
            validation: this worker's micro-batches, as many as every other worker's; empty: none.
            filler: the padding token.
            checkpoints: directory for them; None: none are kept.
        """
        self.model, self.passes, self.validation = model, passes, validation
        self.filler, self.worker = filler, worker
        trained: dict[str, nn.Parameter] = {
            key: value for key, value in model.named_parameters() if value.requires_grad
        }
        self.arm = Arm(
            trained,
            optimizer,
            settings=settings,
            plan=plan,
            examples=examples,
            validates=len(validation) > 0,
            worker=worker,
            checkpoints=checkpoints,
            log=log,
        )

    def run(self, resume_from: str | None) -> None:
        """Train to the last step, or until early stopping.

        Raises:
            UserError: too many gradients in a row were not finite.
        """
        if resume_from is not None:
            self.arm.resume(resume_from)
        elif self.worker.world > 1:
            self._start_alike()
        self.model.train()
        self.arm.log.leave_out()
        while self.arm.running:
            self._step(self.arm.progress.step)
            self._after_a_step()
        self.arm.finish()
        self.arm.require_finite()

    def _step(self, step: int) -> None:
        rows = self.arm.begin()
        self.passes.begin(rows.losses)
        for micro in rows.mine:
            self.passes.add(self._collate(micro))
        loss = self.passes.loss()[0]
        if self.worker.world > 1:
            loss = self._sum_over_workers(loss)
        self.arm.take(rows, loss)

    def _collate(self, micro: Micro) -> Rows:
        return collate(micro, packed=self.arm.settings.packing, filler=self.filler, buckets=self.passes.buckets)

    def _after_a_step(self) -> None:
        if self.arm.to_validate:
            self.arm.log.flush()
            self.model.eval()
            loss = mean_loss(self.model, self.validation, self.worker.device, over_ranks=self.worker.world > 1)
            self.model.train()
            self.arm.validated(loss)
        self.arm.checkpoint_if_due()

    @torch.no_grad()
    def _sum_over_workers(self, loss: Tensor) -> Tensor:
        """Sum gradients and loss, together; returns the loss."""
        parameters = list(self.arm.trained.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        total = loss.clone()
        sum_over_ranks([*(parameter.grad for parameter in parameters if parameter.grad is not None), total])
        return total

    @torch.no_grad()
    def _start_alike(self) -> None:
        """Give every worker rank 0's parameters."""
        for parameter in self.arm.trained.values():
            dist.broadcast(parameter.data, src=0)
