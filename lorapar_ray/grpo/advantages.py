"""From rewards to advantages (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""


def group_advantages(
    rewards_N: Tensor, group_size: int | Sequence[int], scale: Literal["group", "batch", "none"] = "group"
) -> Tensor:
    """Reward minus the group's mean, [N]; groups are consecutive runs.

    Args:
        group_size: of every group, or of each.
        scale: divide by the group's standard deviation (the original), by that of all rewards, or by nothing (Dr. GRPO,
            arXiv 2503.20783).

    Raises:
        ValueError: N rewards do not form such groups.
    """
    count = rewards_N.numel()
    sizes = [group_size] * (count // group_size) if isinstance(group_size, int) else list(group_size)
    if sum(sizes) != count:
        raise ValueError(f"{count} rewards do not form groups of {group_size}")
    groups = rewards_N.float().split(sizes)
    centred = [group - group.mean() for group in groups]
    if scale == "group":
        centred = [own / (_spread(group) + EPSILON) for own, group in zip(centred, groups, strict=True)]
    elif scale == "batch":
        centred = [own / (_spread(rewards_N.float()) + EPSILON) for own in centred]
    return torch.cat(centred) if centred else rewards_N.float()


def _spread(rewards: Tensor) -> Tensor:
    """Standard deviation; 0 for a single sample (the others of its group were lost), so its advantage is 0."""
    return rewards.std() if rewards.numel() > 1 else torch.zeros(())


def overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): 0 up to max_length − cache, then linearly to −1."""
    return -min(1.0, max(0.0, (length - (max_length - cache)) / cache))
