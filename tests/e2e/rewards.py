"""A reward that a random model earns unevenly."""

from typing import Any


def letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Share of characters that are lower-case letters."""
    return [sum(c.islower() for c in text) / max(1, len(text)) for text in completions]
