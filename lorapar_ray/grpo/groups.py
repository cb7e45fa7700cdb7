"""One prompt's completions in the coordinator: reference, lengths and rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.record import GroupHead
from lorapar_ray.grpo.advantages import overlong_penalty
from lorapar_ray.grpo.rewards import RewardBatch


@dataclass
class Group:
    """One prompt, a reference to its completions, and (once scored) their rewards; no tokens and no texts."""

    index: int
    """Index of the prompt in the run's rows."""
    record: Any
    """Reference to the `GroupRecord` in the object store."""
    head: GroupHead
    rewards: list[float] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    failures: int = 0
    """Samples on which a reward failed."""
    failed: dict[str, int] = field(default_factory=dict)
    """Samples lost by reward."""
    errors: dict[str, str] = field(default_factory=dict)
    """Text of the first failure by reward."""
    reward_seconds: float = 0.0

    def take(self, scored: RewardBatch, settings: GrpoConfig) -> None:
        """Add the reward workers' results, and the overlong penalty if configured."""
        self.rewards, self.parts, self.failures = scored.total, scored.parts, sum(scored.failures.values())
        self.failed, self.errors = scored.failed, scored.errors
        if settings.overlong_cache:
            limits = settings.max_completion_length, settings.overlong_cache
            penalties = [overlong_penalty(length, *limits) for length in self.head.answers]  # environment's included
            self.rewards = [reward + penalty for reward, penalty in zip(self.rewards, penalties, strict=True)]
            self.parts = {**self.parts, "overlong": list(penalties)}

    @property
    def spread(self) -> float:
        """Standard deviation of the rewards: 0 means the group has no advantage to learn from."""
        if not self.rewards or min(self.rewards) == max(self.rewards):
            return 0.0  # not a rounding error of the mean
        mean = fmean(self.rewards)
        return sqrt(fmean((reward - mean) ** 2 for reward in self.rewards))

    @property
    def solved(self) -> float:
        """Mean of the first reward (the one for a right answer, by convention), in [0, 1]."""
        values = [value or 0.0 for value in next(iter(self.parts.values()))]
        return min(1.0, max(0.0, fmean(values))) if values else 0.0
