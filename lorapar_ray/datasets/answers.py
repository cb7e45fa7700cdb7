"""The final answer in a piece of text: one definition for rewards and evaluation."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\$?-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?![\d.]))?")
_MARKED = (
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),
)


def extract_answer(text: str) -> str:
    """What follows `####`, stands in the last `\\boxed{}` or `<answer>` tag; else the whole text, stripped."""
    for pattern in _MARKED:
        if found := pattern.findall(text):
            return str(found[-1]).strip()
    return text.strip()


def extract_number(text: str) -> str | None:
    """The last number of the final answer (see `extract_answer`), without `$`, `%` and thousands separators."""
    numbers = _NUMBER.findall(extract_answer(text))
    return None if not numbers else re.sub(r"[\s,$]", "", numbers[-1])


def as_float(number: str) -> float | None:
    """Value of a number as `extract_number` gives it; fractions too. None where it has none."""
    numerator, _, denominator = number.partition("/")
    try:
        return float(numerator) / (float(denominator) if denominator else 1.0)
    except (ValueError, ZeroDivisionError):
        return None
