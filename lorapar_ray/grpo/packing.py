"""Samples as tensors, each prompt computed once for all completions that share it.

A GRPO group is one prompt with G completions. Laid out as `prompt c₁ c₂ … c_G` in one row, with every completion seeing
the prompt and itself only and its positions counted from the prompt's end, the group costs |p| + Σ|c| tokens instead of
G·|p| + Σ|c|: with long prompts and short answers most of the learner's work goes away, and the log-probabilities are
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorapar_ray.grpo.batches import Sample


@dataclass(frozen=True)
class PackedRows:
    """R rows of width W; B sequences of at most T completion tokens lie in them.

    Prompts end at column `first` of every row, so one `logits_to_keep` fits all.
    """

    input_ids_RW: Tensor
    position_ids_RW: Tensor
    visible_RWW: Tensor
    """True where a column (second) may be seen from a column (first)."""
    first: int
    """Column of each prompt's last token: where the first completion token is predicted."""
    row_B: Tensor
    source_BT: Tensor
    """Column, counted from `first`, whose logits predict each completion token (0 for padding)."""
    token_ids_BT: Tensor
    mask_BT: Tensor
    sampling_logprobs_BT: Tensor
    advantages_B: Tensor


def pack(groups: Sequence[Sequence[Sample]], pad_id: int, device: torch.device) -> PackedRows:
    """One row per group; all samples of a group have the same prompt."""
    first = max(len(group[0].prompt_ids) for group in groups) - 1
    width = first + 1 + max(sum(len(sample.token_ids) for sample in group) for group in groups)
    longest = max(len(sample.token_ids) for group in groups for sample in group)
    samples = [sample for group in groups for sample in group]
    ids = torch.full((len(groups), width), pad_id)
    positions = torch.zeros((len(groups), width), dtype=torch.long)
    segment = torch.full((len(groups), width), -1)  # 0 the prompt, 1.. its completions, -1 padding
    source = torch.zeros((len(samples), longest), dtype=torch.long)
    tokens = torch.full((len(samples), longest), pad_id)
    mask, logprobs = torch.zeros((len(samples), longest)), torch.zeros((len(samples), longest))
    row_of: list[int] = []
    for row, group in enumerate(groups):
        prompt = group[0].prompt_ids
        start = first + 1 - len(prompt)
        ids[row, start : first + 1] = torch.tensor(prompt)
        positions[row, start : first + 1] = torch.arange(len(prompt))
        segment[row, start : first + 1] = 0
        column = first + 1
        for number, sample in enumerate(group, start=1):
            index, length = len(row_of), len(sample.token_ids)
            here = slice(column, column + length)
            ids[row, here] = torch.tensor(sample.token_ids)
            positions[row, here] = torch.arange(len(prompt), len(prompt) + length)
            segment[row, here] = number
            source[index, 1:length] = torch.arange(column, column + length - 1) - first
            tokens[index, :length] = torch.tensor(sample.token_ids)
            mask[index, :length] = 1.0
            logprobs[index, :length] = torch.tensor(sample.logprobs)
            row_of.append(row)
            column += length
    causal = torch.ones((width, width), dtype=torch.bool).tril()
    own = segment[:, :, None] == segment[:, None, :]
    visible = causal & (own | (segment[:, None, :] == 0)) & (segment[:, None, :] >= 0)
    return PackedRows(
        input_ids_RW=ids.to(device),
        position_ids_RW=positions.to(device),
        visible_RWW=visible.to(device),
        first=first,
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


def additive_mask(visible_RWW: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1, W, W]: 0 where visible, the dtype's lowest value elsewhere (finite, so that padding rows stay finite)."""
    mask = torch.zeros(visible_RWW.shape, dtype=dtype, device=visible_RWW.device)
    return mask.masked_fill_(~visible_RWW, torch.finfo(dtype).min)[:, None]
