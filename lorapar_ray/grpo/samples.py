"""What a learner trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """One completion with everything a learner needs; arrays are views of the group's record."""

    prompt_ids: Sequence[int] | NDArray[Any]
    token_ids: Sequence[int] | NDArray[Any]
    logprobs: Sequence[float] | NDArray[Any]
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


def whole_batch(samples: list[Sample]) -> MiniBatch:
    """Samples that one learner trains on in a single update."""
    return MiniBatch(samples, sum(len(sample.token_ids) for sample in samples), len(samples))
