"""The updates on one batch: loss against the old policy, gradients over all learners, one optimiser step each.

The adapter is small, so one all-reduce sums the gradients over learners, without wrapping the model; every rank then
takes the same step and has the same policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorapar_ray.collectives import sum_over_ranks
from lorapar_ray.config import GrpoConfig
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.figures import as_numbers, from_all_ranks, step_metrics
from lorapar_ray.grpo.forward import Forward
from lorapar_ray.grpo.loss import part_weight, policy_loss, sampler_figures
from lorapar_ray.grpo.packing import PackedRows
from lorapar_ray.grpo.samples import MiniBatch, Sample

if TYPE_CHECKING:
    from lorapar_ray.optim import MaskedAdamW

OldLogprobs = dict[int, Tensor]
"""By `id` of the sample, the log-probabilities of its completion under the policy before the batch's first update."""


class Updates:
    """Computes the updates of one learner."""

    def __init__(
        self, forward: Forward, parameters: Mapping[str, Tensor], optimizer: MaskedAdamW, settings: GrpoConfig
    ) -> None:
        self._forward, self._parameters, self._optimizer, self._settings = forward, parameters, optimizer, settings
        self._reference = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        self._skipped = 0
        """Updates skipped in a row."""

    def take(
        self, mini_batch: MiniBatch, old: OldLogprobs, world: int, before: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """One optimiser update; skipped, and counted, if its loss or gradient is not finite.

        Args:
            before: called when the gradient is ready, before any parameter changes.

        Raises:
            UserError: it is the `nonfinite_limit`th in a row.
        """
        self._optimizer.zero_grad(set_to_none=False)
        figures: list[tuple[dict[str, Tensor], int]] = []
        micros = self._forward.micro_batches(mini_batch.samples)
        passes = self._forward.passes_of_all(len(micros))
        for micro in micros:
            loss, found = self._loss(micro, mini_batch, old)
            loss.backward()
            figures.append(({"loss": loss.detach(), **found}, sum(map(len, micro))))
        self._forward.dummy_passes(passes - len(micros))
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parts = [(as_numbers(each), count) for each, count in figures] if self._forward.leads else []
        if world > 1:
            sum_over_ranks([value.grad for value in self._parameters.values() if value.grad is not None])
            parts = from_all_ranks(parts, world)
        if before is not None:
            before()
        return self._step(step_metrics(parts))

    def _step(self, metrics: dict[str, float]) -> dict[str, float]:
        norm = nan
        if isfinite(metrics["loss"]):
            norm = float(self._optimizer.clip_and_step(self._settings.max_grad_norm, only_finite=True))
        if isfinite(norm):
            self._skipped = 0
            return {**metrics, "grad_norm": norm, "updates_skipped": 0.0}
        self._skipped += 1
        if self._skipped >= self._settings.nonfinite_limit:
            raise UserError(
                f"grpo: the loss or its gradient was not finite in {self._skipped} updates in a row (loss "
                f"{metrics['loss']:g}, gradient norm {norm:g}); lower grpo.learning_rate, or look at "
                "the last lines of metrics/grpo.jsonl"
            )
        return {"updates_skipped": 1.0}

    @torch.no_grad()
    def old_logprobs(self, updates: Sequence[MiniBatch]) -> OldLogprobs:
        """Log-probabilities under the policy before the first update.

        Those of the first update's samples are computed in the update itself.
        """
        old: OldLogprobs = {}
        if len(updates) == 1 or self._settings.old_policy == "sampler":
            return old
        first = {id(sample) for sample in updates[0].samples}
        later = {id(sample): sample for update in updates[1:] for sample in update.samples if id(sample) not in first}
        micros = self._forward.micro_batches(list(later.values()))
        passes = self._forward.passes_of_all(len(micros))
        for micro in micros:
            _remember(old, micro, self._forward.logprobs(self._forward.rows(micro))[0])
        self._forward.dummy_passes(passes - len(micros), backward=False)
        return old

    def _loss(
        self, groups: list[list[Sample]], mini_batch: MiniBatch, old: OldLogprobs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """These samples' part of an update's loss, and its figures; records their old log-probabilities."""
        settings = self._settings
        samples = [sample for group in groups for sample in group]
        rows = self._forward.rows(groups)
        reference_BT = self._reference_logprobs(rows) if settings.kl_beta > 0 else None
        logprobs_BT, entropy_BT = self._forward.logprobs(rows)
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
        current = {key: parameter.detach().clone() for key, parameter in self._parameters.items()}
        try:
            assign(self._parameters, self._reference)
            return self._forward.logprobs(rows)[0]
        finally:
            assign(self._parameters, current)


def assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Put values into parameters, in place."""
    for key, parameter in parameters.items():
        parameter.data.copy_(values[key])


def _remember(old: OldLogprobs, groups: Sequence[Sequence[Sample]], logprobs_BT: Tensor) -> None:
    samples = [sample for group in groups for sample in group]
    for sample, found in zip(samples, logprobs_BT, strict=True):
        old[id(sample)] = found[: sample.count]


def _recall(old: OldLogprobs, samples: Sequence[Sample], rows: PackedRows) -> Tensor:
    return rows.spread(torch.cat([old[id(sample)] for sample in samples]))
