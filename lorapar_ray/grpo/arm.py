"""One policy that a learner trains: its parameters, optimiser, versions and checkpoints.

A learner trains one, or those of several runs on one frozen base (see `learner.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.boundary import boundary
from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.policy import Policy, PolicySender
from lorapar_ray.errors import UserError
from lorapar_ray.grpo import checkpoint
from lorapar_ray.grpo.loss import part_weight, policy_loss
from lorapar_ray.grpo.packing import PackedRows
from lorapar_ray.grpo.samples import MiniBatch, Sample
from lorapar_ray.optim.schedule import learning_rate_factor
from lorapar_ray.tensortree import OTHERS

OldLogprobs = dict[int, Tensor]
"""By `id` of the sample, the log-probabilities of its completion under the policy before the batch's first update."""


class Arm:
    """Trains one adapter; the log-probabilities come from the learner's forward passes."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: GrpoConfig,
        *,
        steps: int,
        masks: Mapping[str, Tensor] | None = None,
        config: str = "{}",
        checkpoints: Path = Path(),
    ) -> None:
        """Take the adapter's parameters, and how to train them.

        Args:
            parameters: by PEFT's saved keys.
            steps: of the whole stage.
            masks: bool, by key, of the elements that train; None: all.
            config: the adapter's `adapter_config.json`, which engines get.
            checkpoints: directory for them.
        """
        from lorapar_ray.optim import MaskedAdamW, masked_param_groups

        self.parameters, self.settings, self.steps = parameters, settings, steps
        self._checkpoints = checkpoints
        self._sender = PolicySender(config, masks)
        masks = masks or {key: torch.ones_like(each, dtype=torch.bool) for key, each in parameters.items()}
        self._optimizer = MaskedAdamW(
            masked_param_groups(parameters, masks, lr=settings.learning_rate, weight_decay=settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self._reference = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        self._skipped = 0
        """Updates skipped in a row."""
        self._failure: str | None = None

    def begin(self, mini_batches: Sequence[MiniBatch], step: int) -> tuple[list[MiniBatch], float]:
        """Set the step's learning rate; returns what each update trains on (nothing for an empty batch), and the rate.

        Args:
            mini_batches: one update each; with `updates_per_batch` they are repeated.
        """
        settings = self.settings
        rate = settings.learning_rate * learning_rate_factor(
            step, self.steps, warmup_ratio=settings.warmup_ratio, kind=settings.schedule
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        count = (settings.updates_per_batch or len(mini_batches)) if mini_batches else 0
        return [mini_batches[number % len(mini_batches)] for number in range(count)], rate

    def loss(
        self,
        groups: Sequence[Sequence[Sample]],
        mini_batch: MiniBatch,
        old: OldLogprobs,
        rows: PackedRows,
        logprobs_BT: Tensor,
        entropy_BT: Tensor,
        reference_BT: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """These samples' part of an update's loss, and its figures; records their old log-probabilities.

        Args:
            rows: the samples' own rows.
            reference_BT: log-probabilities under the adapter that the stage began with, if the loss has a KL term.
        """
        settings = self.settings
        samples = [sample for group in groups for sample in group]
        sampler = settings.old_policy == "sampler"
        if not sampler and id(samples[0]) not in old:
            remember(old, groups, logprobs_BT.detach())
        output = policy_loss(
            logprobs_BT,
            None if sampler else _recall(old, samples, rows),
            rows.advantages_B,
            rows.mask_BT,
            loss_type=settings.loss,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            max_completion_length=settings.max_completion_length,
            num_tokens_global=mini_batch.tokens,
            ref_logprobs_BT=reference_BT,
            kl_beta=settings.kl_beta,
            sampling_logprobs_BT=rows.sampling_logprobs_BT,
            tis_cap=settings.importance_cap,
            sequence_mask_bounds=settings.sequence_ratio_bounds,
            entropy_BT=entropy_BT,
        )
        weight = part_weight(
            settings.loss, len(samples) / mini_batch.count, len(rows.tokens_N) / max(1, mini_batch.tokens)
        )
        return output.loss * weight, output.figures

    def update(self, metrics: dict[str, float]) -> dict[str, float]:
        """One optimiser update from the gradients; skipped, and counted, if the loss or a gradient is not finite.

        Returns: the metrics with the gradient's norm; of a skipped update, the finite ones. See `require_finite`.
        """
        norm = nan
        if isfinite(metrics["loss"]):
            norm = float(self._optimizer.clip_and_step(self.settings.max_grad_norm, only_finite=True))
        if isfinite(norm):
            self._skipped = 0
            return {**metrics, "grad_norm": norm, "updates_skipped": 0.0}
        self._skipped += 1
        if self._skipped == self.settings.nonfinite_limit:
            self._failure = (
                f"grpo: the loss or its gradient was not finite in {self._skipped} updates in a row (loss "
                f"{metrics['loss']:g}, gradient norm {norm:g}); lower grpo.learning_rate, or look at "
                "the last lines of metrics/grpo.jsonl"
            )
        return {**{key: value for key, value in metrics.items() if isfinite(value)}, "updates_skipped": 1.0}

    def require_finite(self) -> None:
        """Check the updates so far; called once their metrics are written.

        Raises:
            UserError: `nonfinite_limit` in a row were skipped.
        """
        if self._failure is not None:
            raise UserError(self._failure)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context the parameters have the values that the stage began with."""
        current = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        try:
            assign(self.parameters, self._reference)
            yield
        finally:
            assign(self.parameters, current)

    def policy(self, version: int) -> Policy:
        """The current adapter as a message: complete the first time, then only elements that may have changed."""
        return self._sender.policy(version, self.parameters)

    def save(self, step: int, stream: dict[str, Any]) -> None:
        """Checkpoint after `step` steps, with the state of the prompt stream."""
        tree = {
            "stream": stream,
            "parameters": {key: parameter.detach() for key, parameter in self.parameters.items()},
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        checkpoint.save(self._checkpoints, step, tree)

    def restore(self, rank: int, world: int) -> tuple[int, dict[str, Any] | None]:
        """Load the newest checkpoint; returns (steps done, prompt stream state).

        Raises:
            UserError: it is damaged although its length is right.
        """
        folder = self._checkpoints
        tree = checkpoint.newest(folder, rank, world)
        if tree is None:
            return 0, None
        with boundary(f"grpo: the newest checkpoint in '{folder}' is damaged", OTHERS):
            assign(self.parameters, tree["parameters"])
            self._optimizer.load_state_dict(tree["optimizer"])
            torch.set_rng_state(tree["rng"])
            return int(tree["step"]), tree["stream"]


def assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Put values into parameters, in place."""
    for key, parameter in parameters.items():
        parameter.data.copy_(values[key])


def remember(old: OldLogprobs, groups: Sequence[Sequence[Sample]], logprobs_BT: Tensor) -> None:
    """Keep the samples' log-probabilities as those of the old policy."""
    samples = [sample for group in groups for sample in group]
    for sample, found in zip(samples, logprobs_BT, strict=True):
        old[id(sample)] = found[: sample.count]


def _recall(old: OldLogprobs, samples: Sequence[Sample], rows: PackedRows) -> Tensor:
    return rows.spread(torch.cat([old[id(sample)] for sample in samples]))
