"""What an engine samples."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Kept:
    """The tokens among which each token was sampled, end to end."""

    token_ids: list[int]
    counts: list[int]
    """How many of them belong to each sampled token."""

    def add(self, token_ids: list[int]) -> None:
        """Those of the next sampled token."""
        self.token_ids += token_ids
        self.counts.append(len(token_ids))

    def extend(self, other: Kept) -> None:
        """Those of the next sampled tokens."""
        self.token_ids += other.token_ids
        self.counts += other.counts


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: list[int]
    logprobs: list[float]
    """Of each token, under the policy and temperature that sampled it."""
    finished: bool
    """False if it was cut at the length limit."""
    version: int
    """Policy version when sampling began; -1 is the base model. A policy that arrived meanwhile wrote the rest."""
    kept: Kept = field(default_factory=lambda: Kept([], []))
    """What top-k, top-p and min-p left to sample from; empty where nothing was cut."""
