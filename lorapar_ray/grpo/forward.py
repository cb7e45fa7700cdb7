"""Forward passes over samples: their size, their layout, and dummy forward passes while other ranks have more to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import ceil
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.config import GrpoConfig
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.head import TokenScorer
from lorapar_ray.grpo.memory import PROBE_TOKENS, checkpoint_layers, pass_limits
from lorapar_ray.grpo.packing import (
    ArmsRows,
    PackedRows,
    group_by_prompt,
    micro_batches,
    pack,
    pack_arms,
    packed_logprobs,
    pad,
    padded_micro_batches,
    slices_of,
)
from lorapar_ray.grpo.samples import Sample
from lorapar_ray.packed_attention import CLOSE, CLOSE_16_BIT, use_packed_attention
from lorapar_ray.sequence_parallel import FIELD, SequenceGroup, require_shareable


class Forward:
    """Computes log-probabilities of samples with one learner's model."""

    def __init__(
        self,
        model: Any,
        settings: GrpoConfig,
        *,
        pad_id: int,
        filler: Sample,
        sharded: bool,
        device: torch.device,
        sequence: SequenceGroup | None = None,
        arms: int = 1,
    ) -> None:
        """Take the model, and detect its features.

        Args:
            filler: a short sample for dummy passes.
            sharded: the base is cut over the learners, so each pass needs them all.
            sequence: the learners that share each row with this one, and so make every pass together with it.
            arms: number of adapters; more than one: `model` is a `ManyAdapters`.

        Raises:
            UserError: the model's rows cannot be shared; or it has several adapters, and its attention cannot be
                packed.
        """
        self._settings, self._pad_id, self._filler, self._arms = settings, pad_id, filler, arms
        self._sharded, self.device, self._sequence = sharded, device, sequence
        base = model.get_base_model()
        with model.disable_adapter() if arms > 1 else nullcontext():  # adapters of arms count the model's own inputs
            self.packed = use_packed_attention(base)
        """Whether prompts are computed once, in rows without padding."""
        if arms > 1 and not self.packed:
            raise UserError("grpo: this model's attention cannot be packed, so its arms train alone")
        self._scorer = TokenScorer(model)
        if sequence is not None:
            self._require_shareable(model, sequence)
        share = settings.learner_resources.gpu_count if device.type == "cuda" else 1 / settings.most_learners
        ranks = 1 if sequence is None else sequence.size
        probe = self.rows([[Sample([5] * PROBE_TOKENS * ranks, [5], [0.0], 0.0, finished=True, version=0)]]).inputs
        tokens, checkpointed = pass_limits(
            model,
            probe,
            ceil((settings.max_prompt_length + settings.max_completion_length) / ranks),
            share=min(1.0, share or 1.0),
            checkpointing=settings.gradient_checkpointing,
            logits=self._scorer.stores_logits(probe),
        )
        if sequence is not None:  # its ranks make the same passes, as long as the fullest device allows
            tokens = ranks * sequence.least(tokens, device)
            checkpointed = not sequence.least(not checkpointed, device)
        if checkpointed:
            checkpoint_layers(base)
        self._tokens = max(1, (settings.micro_batch_tokens or tokens) // arms)
        """Most tokens of an arm in one pass."""

    @property
    def together(self) -> bool:
        """Whether a pass needs other ranks."""
        return self._sharded or self._sequence is not None

    @property
    def leads(self) -> bool:
        """Whether this rank counts its samples: of ranks that share them, one does."""
        return self._sequence is None or self._sequence.leads

    @torch.no_grad()
    def _require_shareable(self, model: Any, sequence: SequenceGroup) -> None:
        """Check that this model's rows can be shared, and, on one sample, that sharing changes nothing."""
        if self.packed:
            require_shareable(model.config, sequence.size)
            alone, shared = (
                packed_logprobs(self._scorer, pack([[self._filler]], self.device, ranks), temperature=1.0)[0]
                for ranks in (None, sequence)
            )
            if (shared - alone).norm() <= CLOSE.get(model.dtype, CLOSE_16_BIT) * alone.norm():
                return
        raise UserError(
            f"{FIELD}: learners cannot share sequences of this model: its tokens interact outside attention, or its "
            "attention is of an unknown kind; set 1"
        )

    def micro_batches(self, samples: Sequence[Sample]) -> list[list[list[Sample]]]:
        """Samples as passes, each a list of groups that share a prompt; without packed attention, of single samples."""
        most = self._tokens, self._settings.micro_batch_size
        if self.packed:
            return list(micro_batches(group_by_prompt(samples), *most))
        return [[[sample] for sample in micro] for micro in padded_micro_batches(samples, *most)]

    def rows(self, groups: Sequence[Sequence[Sample]]) -> PackedRows:
        """One pass's tensors."""
        if self.packed:
            return pack(groups, self.device, self._sequence)
        return pad([sample for group in groups for sample in group], self._pad_id, self.device)

    def rows_of(self, micro: Mapping[int, Sequence[Sequence[Sample]]]) -> ArmsRows:
        """One pass's tensors for groups of some arms, in order of their numbers."""
        if self._arms == 1:
            whole = self.rows(micro[0])
        else:
            parts = [micro.get(number, []) for number in range(max(micro) + 1)]
            whole = pack_arms(parts, self.device)
            whole.inputs["arms"] = len(parts)
        samples = {number: [sample for group in groups for sample in group] for number, groups in micro.items()}
        return ArmsRows(
            whole,
            slices_of({number: len(own) for number, own in samples.items()}),
            slices_of({number: sum(sample.count for sample in own) for number, own in samples.items()}),
        )

    def logprobs(self, rows: PackedRows, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropy (no gradient), float32, [B, T]; at the sampling temperature unless given."""
        asked = self._settings.temperature if temperature is None else temperature
        return packed_logprobs(self._scorer, rows, temperature=asked)

    def passes_of_all(self, passes: int) -> int:
        """Number of passes that every rank makes: with a sharded base each pass needs all ranks.

        Exchanged before the first pass: during a pass ranks only gather weights.
        """
        if not self._sharded:
            return passes
        from lorapar_ray.collectives import most_of_any_rank

        return most_of_any_rank(passes, self.device)

    def dummy_passes(self, passes: int, backward: bool = True, reference: bool = False) -> None:
        """Dummy forward and backward passes, while other ranks have more to do; they change nothing.

        Args:
            reference: each with a forward pass of the reference.
        """
        if passes == 0:
            return
        rows = self.rows([[self._filler]])
        for _ in range(passes):
            if reference:
                with torch.no_grad():
                    self.logprobs(rows)
            with torch.set_grad_enabled(backward):
                logprobs_BT, _ = self.logprobs(rows)
            if backward:
                (logprobs_BT.sum() * 0.0).backward()
