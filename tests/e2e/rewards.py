"""Rewards that differ between a random model's completions."""

from typing import Any

TOKENS = 8
"""Most tokens of a completion in the tiny run."""


def words(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Mostly the share of tokens that begin a word; letters break ties, so that every group has a difference."""
    begun = [min(1.0, text.count(" ") / TOKENS) for text in completions]
    return [0.9 * share + 0.1 * own for share, own in zip(begun, letters(prompts, completions), strict=True)]


def letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Share of characters that are lower-case letters."""
    return [sum(c.islower() for c in text) / max(1, len(text)) for text in completions]
