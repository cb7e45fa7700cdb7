"""Samples as tensors, each prompt computed once for all completions that share it.

A GRPO group is one prompt with G completions. Laid out as `prompt c₁ c₂ … c_G` in one row, with every completion seeing
the prompt and itself only and its positions counted from the prompt's end, the group costs |p| + Σ|c| tokens instead of
G·|p| + Σ|c|: with long prompts and short answers most of the learner's work goes away, and the log-probabilities are
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.grpo.batches import Sample
from lorapar_ray.logprobs import logits_at, token_logprobs


@dataclass(frozen=True)
class PackedRows:
    """R rows of width W; B sequences of at most T completion tokens lie in them."""

    input_ids_RW: Tensor
    position_ids_RW: Tensor
    segment_RW: Tensor
    """0 in the prompt, 1, 2, … in its completions, -1 in padding."""
    row_B: Tensor
    source_BT: Tensor
    """Column whose logits predict each completion token (0 for padding)."""
    token_ids_BT: Tensor
    mask_BT: Tensor
    sampling_logprobs_BT: Tensor
    advantages_B: Tensor


def pack(groups: Sequence[Sequence[Sample]], pad_id: int, device: torch.device) -> PackedRows:
    """One row per group; all samples of a group have the same prompt."""
    width = max(len(group[0].prompt_ids) + sum(len(sample.token_ids) for sample in group) for group in groups)
    longest = max(len(sample.token_ids) for group in groups for sample in group)
    samples = [sample for group in groups for sample in group]
    ids = torch.full((len(groups), width), pad_id)
    positions = torch.zeros((len(groups), width), dtype=torch.long)
    segment = torch.full((len(groups), width), -1)
    source = torch.zeros((len(samples), longest), dtype=torch.long)
    tokens = torch.full((len(samples), longest), pad_id)
    mask, logprobs = torch.zeros((len(samples), longest)), torch.zeros((len(samples), longest))
    row_of: list[int] = []
    for row, group in enumerate(groups):
        prompt = group[0].prompt_ids
        column = len(prompt)
        ids[row, :column] = torch.tensor(prompt)
        positions[row, :column] = torch.arange(column)
        segment[row, :column] = 0
        for number, sample in enumerate(group, start=1):
            index, length = len(row_of), len(sample.token_ids)
            here = slice(column, column + length)
            ids[row, here] = torch.tensor(sample.token_ids)
            positions[row, here] = torch.arange(len(prompt), len(prompt) + length)
            segment[row, here] = number
            source[index, 0] = len(prompt) - 1
            source[index, 1:length] = torch.arange(column, column + length - 1)
            tokens[index, :length] = torch.tensor(sample.token_ids)
            mask[index, :length] = 1.0
            logprobs[index, :length] = torch.tensor(sample.logprobs)
            row_of.append(row)
            column += length
    return PackedRows(
        input_ids_RW=ids.to(device),
        position_ids_RW=positions.to(device),
        segment_RW=segment.to(device),
        row_B=torch.tensor(row_of, device=device),
        source_BT=source.to(device),
        token_ids_BT=tokens.to(device),
        mask_BT=mask.to(device),
        sampling_logprobs_BT=logprobs.to(device),
        advantages_B=torch.tensor([sample.advantage for sample in samples], device=device),
    )


def group_by_prompt(samples: Sequence[Sample], shared: bool = True) -> list[list[Sample]]:
    """Runs of samples with the same prompt, in order of first appearance; singletons if not `shared`."""
    if not shared:
        return [[sample] for sample in samples]
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample.prompt_ids), []).append(sample)
    return list(groups.values())


def can_share_prompts(config: object) -> bool:
    """Whether a model takes any attention mask: not with sliding windows or flash attention."""
    layers = getattr(config, "layer_types", None) or []
    windows = "sliding_attention" in layers or bool(getattr(config, "sliding_window", None))
    return not windows and getattr(config, "_attn_implementation", "") in ("sdpa", "eager")


def packed_logprobs(model: Any, rows: PackedRows, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy (no gradient) of the completion tokens, float32, [B, T]; 0 in padding."""
    inputs = {
        "input_ids": rows.input_ids_RW,
        "position_ids": rows.position_ids_RW,
        "attention_mask": attention_mask(rows, model.dtype),
    }
    real_BT = rows.mask_BT.bool()
    row_N = rows.row_B[:, None].expand_as(rows.source_BT)[real_BT]
    logits_NV = logits_at((row_N, rows.source_BT[real_BT]), model, inputs)
    found = token_logprobs(logits_NV, rows.token_ids_BT[real_BT], temperature=temperature)
    logprobs_BT, entropy_BT = (torch.zeros_like(rows.mask_BT).masked_scatter(real_BT, each) for each in found)
    return logprobs_BT, entropy_BT


def attention_mask(rows: PackedRows, dtype: torch.dtype) -> Tensor:
    """[R, W], the model's usual one, where each row holds one completion; else [R, 1, W, W], additive.

    There a completion sees the prompt and itself: 0 where visible, elsewhere the dtype's lowest value (finite, so that
    padding rows stay finite).
    """
    segment_RW = rows.segment_RW
    if len(rows.row_B) == len(segment_RW):
        return (segment_RW >= 0).long()
    seen_RW = segment_RW[:, None, :]
    visible_RWW = ((segment_RW[:, :, None] == seen_RW) | (seen_RW == 0)).tril() & (seen_RW >= 0)
    mask = torch.zeros(visible_RWW.shape, dtype=dtype, device=segment_RW.device)
    return mask.masked_fill_(~visible_RWW, torch.finfo(dtype).min)[:, None]
