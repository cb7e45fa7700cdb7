"""What an engine samples."""

from __future__ import annotations

from dataclasses import dataclass


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
