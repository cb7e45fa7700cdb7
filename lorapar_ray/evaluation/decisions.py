"""Which questions were answered correctly, by the metrics that say so of each question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Decision = tuple[str, str, str]
"""What was asked (a task of lm-eval, or the test rows), metric and filter."""


def decisions(rows: Iterable[Mapping[str, Any]]) -> dict[Decision, dict[str, bool]]:
    """Right or wrong by decision and question, for decisions whose values are all 0 or 1, in the order of the rows.

    Of another decision, such as a share of ten samples, the questions at 0 or 1 alone would be a biased choice.

    Args:
        rows: `asked`, `task`, `id`, `metric`, `filter`, and `right`, which is None for a value between 0 and 1.
    """
    by: dict[Decision, dict[str, bool | None]] = {}
    for row in rows:
        by.setdefault((row["asked"], row["metric"], row["filter"]), {})[f"{row['task']}/{row['id']}"] = row["right"]
    whole = {}
    for decision, rights in by.items():
        decided = {question: right for question, right in rights.items() if right is not None}
        if len(decided) == len(rights):
            whole[decision] = decided
    return whole
