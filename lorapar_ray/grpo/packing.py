"""Samples as tensors, each prompt computed once for all completions that share it.

A GRPO group is one prompt with G completions. Laid end to end as `prompt c₁ c₂ … c_G`, with every completion seeing the
prompt and itself only (see `packed_attention`) and its positions counted from the prompt's end, the group costs
|p| + Σ|c| tokens instead of G·|p| + Σ|c|, and no padding: with long prompts and short answers this saves most of the
learner's work, and the log-probabilities are the same. A completion's last token predicts nothing and is not computed.

Ranks that share rows (`sequence_parallel`) each get their slice of the inputs, and the positions of the outputs in it.
What belongs to samples (tokens, masks, log-probabilities) is whole on every rank.

A GPU takes all of it without a wait: it may still be busy with the backward pass of the rows before.

Tokens that an environment added to a completion are read like a prompt. They are in no tensor of completion tokens, so
no loss, ratio or metric counts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorapar_ray.grpo.head import TokenScorer
from lorapar_ray.grpo.samples import Sample
from lorapar_ray.packed_layout import make_layout, packed_inputs, spans_of_group
from lorapar_ray.sequence_parallel import SequenceGroup
from lorapar_ray.transfer import on_device


@dataclass(frozen=True)
class OwnTokens:
    """The sampled tokens that one of several ranks predicts."""

    at_n: Tensor
    """Which of the N they are."""
    sequence: SequenceGroup


@dataclass(frozen=True)
class PackedRows:
    """R rows of width W; B sequences of at most T sampled tokens, N together, lie in them."""

    inputs: dict[str, Any]
    """The model's: `input_ids` [R, W], and positions or a mask that define which tokens attend to which."""
    row_N: Tensor
    column_N: Tensor
    """Position of the output that predicts each sampled token, sequence by sequence; with `own`, of those alone."""
    tokens_N: Tensor
    mask_BT: Tensor
    sampling_logprobs_BT: Tensor
    advantages_B: Tensor
    kept_NK: Tensor | None = None
    """The kept tokens that each was sampled from, padded with −1; None: the whole vocabulary."""
    own: OwnTokens | None = None
    """None: this rank's outputs predict all N tokens."""

    def spread(self, values_N: Tensor) -> Tensor:
        """Values of the sampled tokens as [B, T], 0 in padding."""
        return torch.zeros_like(self.mask_BT).masked_scatter(self.mask_BT.bool(), values_N)

    def part(self, sequences: slice, tokens: slice) -> PackedRows:
        """Consecutive sequences, with their tokens, of the same rows."""
        return replace(
            self,
            row_N=self.row_N[tokens],
            column_N=self.column_N[tokens],
            tokens_N=self.tokens_N[tokens],
            mask_BT=self.mask_BT[sequences],
            sampling_logprobs_BT=self.sampling_logprobs_BT[sequences],
            advantages_B=self.advantages_B[sequences],
            kept_NK=None if self.kept_NK is None else self.kept_NK[tokens],
        )


@dataclass(frozen=True)
class ArmsRows:
    """The rows of one pass over samples of one or several arms."""

    whole: PackedRows
    sequences: Mapping[int, slice]
    """Each arm's sequences."""
    tokens: Mapping[int, slice]
    """Each arm's sampled tokens."""

    def part(self, arm: int) -> PackedRows:
        """One arm's rows."""
        return self.whole if len(self.sequences) == 1 else self.whole.part(self.sequences[arm], self.tokens[arm])

    def of(self, arm: int, values_BT: Tensor) -> Tensor:
        """One arm's sequences of some values."""
        return values_BT[self.sequences[arm]]


def slices_of(counts: Mapping[int, int]) -> dict[int, slice]:
    """Consecutive slices of these lengths."""
    ends = list(accumulate(counts.values()))
    return {key: slice(end - count, end) for (key, count), end in zip(counts.items(), ends, strict=True)}


def pack(groups: Sequence[Sequence[Sample]], device: torch.device, sequence: SequenceGroup | None = None) -> PackedRows:
    """One row for all; the samples of a group have the same prompt. For models with packed attention.

    Args:
        sequence: the ranks that share the row; all call this with the same samples. None: this one has it alone.
    """
    return pack_arms([groups], device, sequence)


def pack_arms(
    arms: Sequence[Sequence[Sequence[Sample]]], device: torch.device, sequence: SequenceGroup | None = None
) -> PackedRows:
    """As `pack`, for the groups of several arms: each arm's part of the row is padded to the longest one's length."""
    ids: list[Any] = []
    positions: list[Any] = []
    columns: list[Any] = []
    spans = []
    width, longest = 0, max(map(_width, arms))
    if sequence is not None:
        longest += sequence.padding(longest)
    for number, groups in enumerate(arms, 1):
        for group in groups:
            start = len(group[0].prompt_ids)
            ids.append(group[0].prompt_ids)
            positions.append(np.arange(start))
            prompt, own = range(width, width + start), []
            width += start
            for sample in group:
                length = max(0, len(sample.token_ids) - 1)
                ids.append(sample.token_ids[:length])
                positions.append(np.arange(start, start + length))
                # without a common prompt, nothing predicts the first token, and `_sampled` leaves it out
                predicting = np.append(prompt.stop - 1, np.arange(width, width + length))[: len(sample.token_ids)]
                columns.append(_sampled(sample, predicting))
                own.append(range(width, width + length))
                width += length
            spans += spans_of_group(prompt, own)
        padding = range(width, number * longest)
        if padding:  # a sequence of its own, which nobody reads
            ids.append(np.zeros(len(padding)))
            positions.append(np.arange(len(padding)))
            spans += spans_of_group(padding, [])
            width += len(padding)
    here = slice(0, width) if sequence is None else sequence.own(width)
    layout = make_layout(spans, width, device, sequence)
    inputs = packed_inputs(_ids(ids, device)[None, here], layout, _ids(positions, device)[None, here])
    column_N = np.concatenate(columns)
    at_n = np.flatnonzero((here.start <= column_N) & (column_N < here.stop))
    column_n = _ids([column_N[at_n] - here.start], device)
    mine = None if sequence is None else OwnTokens(_ids([at_n], device), sequence)
    samples = [sample for groups in arms for group in groups for sample in group]
    return _rows(samples, inputs, torch.zeros_like(column_n), column_n, mine)


def _width(groups: Sequence[Sequence[Sample]]) -> int:
    """Tokens that `pack` computes for these groups."""
    return sum(
        len(group[0].prompt_ids) + sum(max(0, len(sample.token_ids) - 1) for sample in group) for group in groups
    )


def pad(samples: Sequence[Sample], pad_id: int, device: torch.device) -> PackedRows:
    """One row per sample, with repeated prompts, for any causal model."""
    widths = list(map(_padded_width, samples))
    ids = np.full((len(samples), max(widths)), pad_id)
    rows, columns = [], []
    for row, sample in enumerate(samples):
        start = len(sample.prompt_ids)
        ids[row, :start] = sample.prompt_ids
        ids[row, start : widths[row]] = sample.token_ids
        rows.append(np.full(sample.count, row))
        columns.append(_sampled(sample, np.arange(start - 1, widths[row] - 1)))
    attention = np.arange(max(widths)) < np.array(widths)[:, None]
    inputs = {
        "input_ids": on_device(torch.from_numpy(ids), device),
        "attention_mask": on_device(torch.from_numpy(attention.astype(np.int64)), device),
    }
    return _rows(samples, inputs, _ids(rows, device), _ids(columns, device))


def _rows(
    samples: Sequence[Sample], inputs: dict[str, Any], row_N: Tensor, column_N: Tensor, own: OwnTokens | None = None
) -> PackedRows:
    device = column_N.device
    counts = np.array([sample.count for sample in samples])
    real_BT = np.arange(counts.max()) < counts[:, None]
    sampling_BT = np.zeros(real_BT.shape, dtype=np.float32)
    sampling_BT[real_BT] = np.concatenate([_sampled(sample, sample.logprobs) for sample in samples])
    return PackedRows(
        inputs=inputs,
        row_N=row_N,
        column_N=column_N,
        tokens_N=_ids([_sampled(sample, sample.token_ids) for sample in samples], device),
        mask_BT=on_device(torch.from_numpy(real_BT.astype(np.float32)), device),
        sampling_logprobs_BT=on_device(torch.from_numpy(sampling_BT), device),
        advantages_B=on_device(torch.tensor([float(sample.advantage) for sample in samples]), device),
        kept_NK=_kept(samples, device),
        own=own,
    )


def _kept(samples: Sequence[Sample], device: torch.device) -> Tensor | None:
    """[N, K]; None if a sample has no kept sets."""
    found = [sample.kept for sample in samples if sample.kept is not None]
    if len(found) < len(samples):
        return None
    counts_N = np.concatenate([_sampled(sample, kept.counts) for sample, kept in zip(samples, found, strict=True)])
    real_NK = np.arange(counts_N.max()) < counts_N[:, None]
    kept_NK = np.full(real_NK.shape, -1, dtype=np.int64)
    kept_NK[real_NK] = np.concatenate([kept.token_ids for kept in found])
    return on_device(torch.from_numpy(kept_NK), device)


def _sampled(sample: Sample, values: Any) -> Any:
    """Select, from one value per token of a completion, the values of sampled tokens."""
    return values if sample.sampled is None else np.asarray(values)[sample.sampled]


def packed_logprobs(scorer: TokenScorer, rows: PackedRows, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy (no gradient) of the sampled tokens, float32, [B, T]; 0 in padding."""
    at, tokens_N, kept_NK, own = (rows.row_N, rows.column_N), rows.tokens_N, rows.kept_NK, rows.own
    if own is None:
        logprobs_N, entropy_N = scorer(rows.inputs, at, tokens_N, temperature, kept_NK)
    else:
        kept_nK = None if kept_NK is None else kept_NK[own.at_n]
        scores = scorer(rows.inputs, at, tokens_N[own.at_n], temperature, kept_nK)
        logprobs_N, entropy_N = own.sequence.together(torch.stack(scores), own.at_n, len(tokens_N))
        entropy_N = entropy_N.detach()
    return rows.spread(logprobs_N), rows.spread(entropy_N)


def group_by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples with the same prompt together, in order of first appearance."""
    groups: dict[bytes, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(np.asarray(sample.prompt_ids, dtype=np.int64).tobytes(), []).append(sample)
    return list(groups.values())


def micro_batches(
    groups: Sequence[Sequence[Sample]], tokens: int, sequences: int | None = None
) -> Iterator[list[list[Sample]]]:
    """Consecutive groups, or pieces of them, of at most `tokens` tokens and `sequences` samples together.

    A group that does not fit is split, and each piece computes the prompt again. A larger sample gets its own pass.
    """
    micro: list[list[Sample]] = []
    used = count = 0
    for group in groups:
        prompt = len(group[0].prompt_ids)
        whole = prompt + sum(len(sample.token_ids) for sample in group)
        if micro and _over(used + whole, count + len(group), tokens, sequences):
            yield micro
            micro, used, count = [], 0, 0
        piece: list[Sample] = []
        for sample in group:
            size = len(sample.token_ids) + (0 if piece else prompt)
            if (micro or piece) and _over(used + size, count + 1, tokens, sequences):
                yield [*micro, piece] if piece else micro
                micro, piece, used, count = [], [], 0, 0
                size = len(sample.token_ids) + prompt
            piece.append(sample)
            used, count = used + size, count + 1
        micro.append(piece)
    if micro:
        yield micro


def padded_micro_batches(
    samples: Sequence[Sample], tokens: int, sequences: int | None = None
) -> Iterator[list[Sample]]:
    """Samples as passes for `pad`, of at most `tokens` tokens, padding included, and `sequences` samples.

    The widest samples come first, so that samples of about equal width share a pass. A larger sample gets its own pass.
    """
    micro: list[Sample] = []
    for sample in sorted(samples, key=_padded_width, reverse=True):
        if micro and _over((len(micro) + 1) * _padded_width(micro[0]), len(micro) + 1, tokens, sequences):
            yield micro
            micro = []
        micro.append(sample)
    if micro:
        yield micro


def _padded_width(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.token_ids)


def _over(used: int, count: int, tokens: int, sequences: int | None) -> bool:
    return used > tokens or (sequences is not None and count > sequences)


def _ids(parts: Sequence[Any], device: torch.device) -> Tensor:
    return on_device(torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])), device)
