"""The training loop of several adapters on one frozen base, on one worker.

A step of the loop is one step of every unfinished arm: the micro-batches of all arms go through the model together,
then each arm's optimiser updates its own adapter. Every arm has the same rows, order, schedule and checkpoints as when
it trains alone, and its own step count: an arm that resumes from a later checkpoint ends earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from math import ceil

import torch
from torch import Tensor

from lorapar_ray.adapters.many import ManyAdapters
from lorapar_ray.collectives import sum_over_ranks
from lorapar_ray.sft.arm import Arm, Micro, Worker
from lorapar_ray.sft.loss import mean_losses
from lorapar_ray.sft.passes import Passes
from lorapar_ray.sft.rows import Rows, collate


class ArmsLoop:
    """Trains stage 1 of several runs together."""

    def __init__(
        self,
        model: ManyAdapters,
        arms: Sequence[Arm],
        passes: Passes,
        *,
        validation: Sequence[Sequence[Micro]],
        packed: bool,
        filler: int,
        worker: Worker,
    ) -> None:
        """Take the arms in the order of the model's adapters.

        Args:
            passes: passes over the model's stacks; they hold the gradients, and each arm's gradients are views of them.
            validation: of each arm, this worker's micro-batches, as many as every other worker's.
            filler: the padding token.
        """
        self.model, self.arms, self.passes, self.validation = model, arms, passes, validation
        self.packed, self.filler, self.worker = packed, filler, worker

    def run(self, resume_from: Sequence[str | None]) -> None:
        """Train every arm to its last step, or until early stopping. One whose gradients are not finite ends before;
        the others go on (`Arm.require_finite`)."""
        for arm, path in zip(self.arms, resume_from, strict=True):
            if path is not None:
                arm.resume(path)
        self.model.train()
        for arm in self.arms:
            arm.log.leave_out()
        while running := [number for number, arm in enumerate(self.arms) if arm.running]:
            self._step(running)
            self._validate([number for number in running if self.arms[number].to_validate])
            for number in running:
                self.arms[number].checkpoint_if_due()
        for arm in self.arms:
            arm.finish()

    def _step(self, running: Sequence[int]) -> None:
        rows = {number: self.arms[number].begin() for number in running}
        self.passes.begin(*(rows[each].losses if each in rows else 0 for each in range(max(rows) + 1)))
        for batch in self._batches({number: each.mine for number, each in rows.items()}, self.passes.buckets):
            self.passes.add(batch)
        losses = self.passes.loss()
        if self.worker.world > 1:
            losses = self._sum_over_workers(losses)
        for number, each in rows.items():
            self.arms[number].take(each, losses[number])

    def _validate(self, due: Sequence[int]) -> None:
        if not due:
            return
        for number in due:
            self.arms[number].log.flush()
        self.model.eval()
        batches = self._batches({number: self.validation[number] for number in due}, buckets=0)
        device, world = self.worker.device, self.worker.world
        losses = mean_losses(self.model, batches, device, arms=len(self.arms), over_ranks=world > 1)
        self.model.train()
        for number in due:
            self.arms[number].validated(losses[number])

    def _batches(self, micros: Mapping[int, Sequence[Micro]], buckets: int) -> Iterator[Rows]:
        """The arms' micro-batches, paired by index; an arm without one, before the last that has one, gets rows without
        a loss.

        On a CPU a pass of all arms has about as many rows as one of a single arm: wider ones are slower there (see
        `jobs/benchmarks/arms.py`), and each row needs memory.
        """
        arms = max(micros) + 1
        if self.worker.device.type == "cpu":
            micros = {number: [part for each in own for part in _cut(each, arms)] for number, own in micros.items()}
        for together in zip_longest(*(micros.get(number, ()) for number in range(arms)), fillvalue=[]):
            most = max(len(rows) for rows in together)
            rows = [row for own in together for row in [*own, *[[]] * (most - len(own))]]
            yield collate(rows, packed=self.packed, filler=self.filler, buckets=buckets, arms=arms)

    @torch.no_grad()
    def _sum_over_workers(self, losses: Tensor) -> Tensor:
        """Sum gradients and losses, together; returns the losses."""
        total = losses.clone()
        sum_over_ranks([*(stack.grad for stack in self.model.stacks() if stack.grad is not None), total])
        return total


def _cut(rows: Micro, parts: int) -> Iterator[Micro]:
    """Rows in at most `parts` pieces of like size."""
    size = ceil(len(rows) / parts)
    return (rows[start : start + size] for start in range(0, len(rows), max(1, size)))
