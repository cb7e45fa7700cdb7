"""What a learner trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorapar_ray.engines.record import KeptSets


@dataclass(frozen=True)
class Sample:
    """One completion with everything a learner needs; arrays are views of the group's record."""

    prompt_ids: Sequence[int] | NDArray[Any]
    token_ids: Sequence[int] | NDArray[Any]
    logprobs: Sequence[float] | NDArray[Any]
    advantage: float
    finished: bool
    version: int
    sampled: NDArray[Any] | None = None
    """Which tokens the policy sampled, [tokens]; None: all. The others are read, and neither predicted nor trained."""
    kept: KeptSets | None = None
    """The kept tokens that they were sampled from; None: the whole vocabulary."""

    @property
    def count(self) -> int:
        """Tokens that count in the loss."""
        return len(self.token_ids) if self.sampled is None else int(self.sampled.sum())


@dataclass(frozen=True)
class MiniBatch:
    """What one learner trains on in one update."""

    samples: list[Sample]
    tokens: int
    """Completion tokens of the update, over all learners: the loss's normaliser."""
    count: int
    """Samples of the update, over all learners."""
