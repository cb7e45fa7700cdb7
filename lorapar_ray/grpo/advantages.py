"""From rewards to advantages (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""


def group_advantages(rewards_N: Tensor, group_size: int, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """Reward minus the group's mean, [N]; groups are consecutive runs of `group_size`.

    Args:
        scale: divide by the group's standard deviation (the original), by that of all rewards, or by nothing (Dr. GRPO,
            arXiv 2503.20783).

    Raises:
        ValueError: N is not a multiple of the group size.
    """
    if rewards_N.numel() % group_size:
        raise ValueError(f"{rewards_N.numel()} rewards do not form groups of {group_size}")
    grouped = rewards_N.float().view(-1, group_size)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (grouped.std(dim=1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centred = centred / (rewards_N.float().std() + EPSILON)
    return centred.view(-1)


def overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): 0 up to max_length − cache, then linearly to −1."""
    return -min(1.0, max(0.0, (length - (max_length - cache)) / cache))
