"""One adapter's training in stage 1: its rows, rates, optimiser, checkpoints and log.

The loops compute its gradients: `loop` trains one adapter, `arms_loop` several on one frozen base.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.collectives import most_of_any_rank
from lorapar_ray.config import SftConfig
from lorapar_ray.errors import UserError
from lorapar_ray.leaving import loses_a_node
from lorapar_ray.optim import MaskedAdamW
from lorapar_ray.optim.schedule import learning_rate_factor
from lorapar_ray.sft.batches import BatchPlan
from lorapar_ray.sft.checkpoint import Progress, load_checkpoint, load_parameters, save_checkpoint
from lorapar_ray.sft.rows import losses_in
from lorapar_ray.sft.step_log import StepLog

LOOK_EVERY = 5
"""Steps between two looks whether a node will be lost, and between the checkpoints until then."""

Example = dict[str, Any]
Micro = list[list[Example]]
"""A micro-batch: rows of concatenated examples."""


@dataclass(frozen=True)
class Worker:
    """This worker's rank, the number of workers, and its device."""

    rank: int
    world: int
    device: torch.device

    def seed(self, seed: int) -> int:
        """Of this worker's dropout masks, in a run with `seed`: equal masks on all would not average out."""
        return zlib.crc32(f"{seed}/{self.rank}".encode())


@dataclass(frozen=True)
class StepRows:
    """What a step computes."""

    mine: list[Micro]
    """This worker's micro-batches; every other worker has as many."""
    losses: int
    """Tokens with a loss, over all workers."""
    tokens: int
    """Tokens, over all workers."""


class Arm:
    """Trains one adapter from a checkpoint, or from the start, to its last step."""

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        optimizer: MaskedAdamW,
        *,
        settings: SftConfig,
        plan: BatchPlan,
        examples: Sequence[Example],
        validates: bool,
        worker: Worker,
        checkpoints: Path | None,
        log: StepLog,
    ) -> None:
        """Store what to train and how.

        Args:
            trained: parameters of the optimiser, by the names that checkpoints give them.
            optimizer: with the schedule's peak rates.
            examples: {input_ids, response_start}, which `plan` numbers.
            checkpoints: directory for them; None: none are kept.
        """
        self.trained, self.optimizer, self.settings = trained, optimizer, settings
        self.plan, self.examples, self.validates = plan, examples, validates
        self.worker, self.checkpoints, self.log = worker, checkpoints, log
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.progress = Progress()

    @property
    def running(self) -> bool:
        """Whether steps remain that can be taken."""
        if self.log.failure is not None:
            return False
        patience = self.settings.patience
        return self.progress.step < self.plan.steps and (patience is None or self.progress.waited < patience)

    def resume(self, path: str) -> None:
        """Resume from a checkpoint.

        Raises:
            UserError: it is damaged, or of another adapter.
        """
        self.progress = load_checkpoint(Path(path), self.worker.rank, self.trained, self.optimizer)

    def begin(self) -> StepRows:
        """Set the next step's learning rates; returns its rows."""
        settings, step = self.settings, self.progress.step
        factor = learning_rate_factor(step, self.plan.steps, warmup_ratio=settings.warmup_ratio, kind=settings.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        micros = self._micro_batches(step)
        everyone = [example for micro in micros for row in micro for example in row]
        tokens = sum(len(example["input_ids"]) for example in everyone)
        return StepRows(micros[self.worker.rank :: self.worker.world], losses_in(everyone), tokens)

    def take(self, rows: StepRows, loss: Tensor) -> None:
        """Take the step of `begin`; the gradients are ready, and the loss (scalar) may still be computing.

        With a gradient that is not finite nothing changes; the log counts such steps.
        """
        norm = self.optimizer.clip_and_step(self.settings.max_grad_norm, only_finite=True)
        self.progress.step += 1
        self.log.put(self.progress.step, loss, norm, self.optimizer.param_groups[0]["lr"], rows.tokens)

    @property
    def to_validate(self) -> bool:
        """Whether a validation follows the last step."""
        return self.validates and self._due

    def validated(self, loss: float) -> None:
        """Record a validation's loss."""
        self.log.validated(self.progress.step, loss)
        if self.progress.heard(loss) and self.checkpoints is not None:
            self.progress.best_checkpoint = str(self.checkpoints / f"checkpoint-{self.progress.step}")

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint if one follows the last step, or if a node will be lost; every rank calls this."""
        if self.checkpoints is not None and (self._due or self._loses_a_node()):
            self.log.flush()  # a run that resumes here writes no line for earlier steps
            worker = self.worker
            save_checkpoint(self.checkpoints, worker.rank, worker.world, self.progress, self.trained, self.optimizer)

    def _loses_a_node(self) -> bool:
        """Whether the group, of which each worker looks at the same steps, will lose a node."""
        if self.progress.step % LOOK_EVERY:
            return False
        worker = self.worker
        here = loses_a_node()
        return here if worker.world == 1 else most_of_any_rank(int(here), worker.device) > 0

    def finish(self) -> None:
        """Write the rest of the log, and set the parameters to the best or last ones, by the settings."""
        self.log.flush()
        best = self.progress.best_checkpoint
        if self.settings.keep == "best" and best is not None and self.worker.rank == 0:  # rank 0 writes the adapter
            load_parameters(Path(best), self.trained)

    def require_finite(self) -> None:
        """Check that training did not end because of gradients that were not finite.

        Raises:
            UserError: `nonfinite_limit` steps in a row were skipped.
        """
        if self.log.failure is not None:
            raise UserError(self.log.failure)

    @property
    def _due(self) -> bool:
        every = self.settings.validate_every if self.validates else self.settings.checkpoint_every
        return self.progress.step >= self.plan.steps or self.progress.step % every == 0

    def _micro_batches(self, step: int) -> list[Micro]:
        """The step's micro-batches; worker r takes number r, r + world, …"""
        plan = self.plan
        count = plan.accumulation * self.worker.world
        start = step * count * plan.micro_batch
        rows = [[self.examples[each] for each in row] for row in plan.rows[start : start + count * plan.micro_batch]]
        return [rows[k * plan.micro_batch : (k + 1) * plan.micro_batch] for k in range(count)]
