"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

from math import cos, pi
from typing import Literal


def learning_rate_factor(
    step: int, total: int, *, warmup_ratio: float, kind: Literal["cosine", "linear", "constant"]
) -> float:
    """Share of the peak learning rate at `step` (0-based) of `total`: linear warm-up, then decay to 0.

    The warm-up takes ceil(warmup_ratio · total) steps, as in transformers.
    """
    warmup = -int(-warmup_ratio * total // 1)
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + cos(pi * progress))
