"""What a learner trains on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One completion with everything a learner needs."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    advantage: float
    finished: bool
    version: int


@dataclass(frozen=True)
class MiniBatch:
    """What one learner trains on in one update."""

    samples: list[Sample]
    tokens: int
    """Completion tokens of the update, over all learners: the loss's normaliser."""
    count: int
    """Samples of the update, over all learners."""


@dataclass(frozen=True)
class Batch:
    """Samples of one step (or one learner's share), and what happened while they were made."""

    samples: list[Sample]
    tokens: int
    """Completion tokens of the whole step, over all learners."""
    count: int
    """Samples of the whole step, over all learners."""
    metrics: dict[str, float]
    examples: list[dict[str, Any]]
    prompts: list[int]
    """Every prompt index the step drew, dropped groups included."""
    mini_batches: list[MiniBatch] = field(default_factory=list)
    """One learner's share, as it is trained on; none: all of it at once."""
