"""What a learner trains on."""

from __future__ import annotations

from dataclasses import dataclass


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
