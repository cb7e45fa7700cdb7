"""Completions of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Kept:
    """The kept tokens from which each token was sampled, concatenated."""

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
    """Policy version when sampling began; -1 is the base model. A policy loaded meanwhile sampled the rest."""
    kept: Kept = field(default_factory=lambda: Kept([], []))
    """The tokens that top-k, top-p and min-p kept; empty if nothing was cut."""
