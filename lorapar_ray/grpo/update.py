"""The updates on one batch: loss against the old policy, gradients over all learners, one optimiser step each.

If a learner trains several policies, a forward and backward pass holds samples of all of them.

The adapter is small, so one all-reduce sums the gradients over learners, without wrapping the model; every rank then
takes the same step and has the same policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import TypeAlias

import torch
from torch import Tensor

from lorapar_ray.collectives import sum_over_ranks
from lorapar_ray.grpo.arm import Arm, OldLogprobs, remember
from lorapar_ray.grpo.figures import Part, as_numbers, from_all_ranks, update_metrics
from lorapar_ray.grpo.forward import Forward
from lorapar_ray.grpo.samples import MiniBatch, Sample

Micro: TypeAlias = dict[int, list[list[Sample]]]
"""One pass: groups of samples by arm, in order; an arm may have none."""


class Updates:
    """Computes the updates of one learner."""

    def __init__(self, forward: Forward, arms: Sequence[Arm], trained: Sequence[Tensor]) -> None:
        """Take the policies, and the parameters that get gradients: the arms', or stacks of which they are views."""
        self._forward, self._arms, self._trained = forward, arms, trained

    def take(
        self,
        mini_batches: Mapping[int, MiniBatch],
        old: OldLogprobs,
        world: int,
        before: Callable[[int], None] | None = None,
    ) -> dict[int, dict[str, float]]:
        """One optimiser update of each of some arms; returns their metrics.

        Args:
            before: called with an arm when its gradient is ready, before its parameters change.
        """
        kept = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        if kept:
            torch._foreach_zero_(kept)
        figures: dict[int, list[tuple[dict[str, Tensor], list[Sample]]]] = {number: [] for number in mini_batches}
        micros = self._micros({number: each.samples for number, each in mini_batches.items()})
        passes = self._forward.passes_of_all(len(micros))
        for micro in micros:
            losses = self._losses(micro, mini_batches, old)
            torch.stack([loss for loss, _ in losses.values()]).sum().backward()
            for number, (loss, found) in losses.items():
                samples = [sample for group in micro[number] for sample in group]
                figures[number].append(({"loss": loss.detach(), **found}, samples))
        self._forward.dummy_passes(passes - len(micros), reference=self._needs_reference(mini_batches))
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parts: dict[int, list[Part]] = {
            number: [Part(as_numbers(each), len(own), sum(sample.count for sample in own)) for each, own in found]
            if self._forward.leads
            else []
            for number, found in figures.items()
        }
        if world > 1:
            sum_over_ranks([parameter.grad for parameter in self._trained if parameter.grad is not None])
            gathered = from_all_ranks([parts], world)
            parts = {number: [part for each in gathered for part in each[number]] for number in parts}
        metrics = {}
        for number, own in parts.items():
            if before is not None:
                before(number)
            metrics[number] = self._arms[number].update(update_metrics(own))
        return metrics

    @torch.no_grad()
    def old_logprobs(self, updates: Mapping[int, Sequence[MiniBatch]]) -> OldLogprobs:
        """Log-probabilities under the policies before the first update.

        Those of the first update's samples are computed in the update itself.
        """
        old: OldLogprobs = {}
        later: dict[int, list[Sample]] = {}
        for number, own in updates.items():
            if len(own) > 1 and self._arms[number].settings.old_policy != "sampler":
                first = {id(sample) for sample in own[0].samples}
                found = {id(sample): sample for update in own[1:] for sample in update.samples}
                later[number] = [sample for key, sample in found.items() if key not in first]
        if not later:
            return old
        micros = self._micros(later)
        passes = self._forward.passes_of_all(len(micros))
        for micro in micros:
            rows = self._forward.rows_of(micro)
            logprobs_BT, _ = self._forward.logprobs(rows.whole)
            for number, groups in micro.items():
                remember(old, groups, rows.of(number, logprobs_BT))
        self._forward.dummy_passes(passes - len(micros), backward=False)
        return old

    def _micros(self, samples: Mapping[int, Sequence[Sample]]) -> list[Micro]:
        """Samples as passes, of all arms together."""
        micros = {number: self._forward.micro_batches(own) for number, own in samples.items()}
        return [
            {number: groups for number, groups in zip(micros, together, strict=True) if groups is not None}
            for together in zip_longest(*micros.values())
        ]

    def _losses(
        self, micro: Micro, mini_batches: Mapping[int, MiniBatch], old: OldLogprobs
    ) -> dict[int, tuple[Tensor, dict[str, Tensor]]]:
        """Each arm's part of its update's loss, and its figures; records their old log-probabilities."""
        rows = self._forward.rows_of(micro)
        reference_BT = None
        if self._needs_reference(mini_batches):
            with torch.no_grad(), ExitStack() as swapped:
                for number in micro:
                    swapped.enter_context(self._arms[number].reference())
                reference_BT, _ = self._forward.logprobs(rows.whole)
        logprobs_BT, entropy_BT = self._forward.logprobs(rows.whole)
        return {
            number: self._arms[number].loss(
                groups,
                mini_batches[number],
                old,
                rows.part(number),
                rows.of(number, logprobs_BT),
                rows.of(number, entropy_BT),
                None if reference_BT is None else rows.of(number, reference_BT),
            )
            for number, groups in micro.items()
        }

    def _needs_reference(self, mini_batches: Mapping[int, MiniBatch]) -> bool:
        return any(self._arms[number].settings.kl_beta > 0 for number in mini_batches)
