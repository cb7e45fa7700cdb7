"""Judges answers in a reward process: the driver has no limits, so it never parses a model's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorapar_ray.grpo.rewards.pool import RewardPool, RewardSpec

REWARD_OF = {"numeric": "numeric_answer", "exact": "exact_answer", "option_letter": "option_letter"}
TIME_LIMIT_S = 5.0
MEMORY_MB = 1024
AT_ONCE = 64
"""Answers per call, which may take TIME_LIMIT_S; a single answer that takes longer counts as wrong."""


def judging_process(answer: str) -> RewardPool:
    """The process that judges by `evaluate.answer`; close it in the end."""
    return RewardPool([RewardSpec(REWARD_OF[answer])], time_limit_s=TIME_LIMIT_S, memory_limit_mb=MEMORY_MB)


def judge(process: RewardPool, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> tuple[list[bool], int]:
    """(whether each text answers its row's question, number of texts that exceeded the limits, which count as
    wrong)."""
    right: list[bool] = []
    lost = 0
    for start in range(0, len(texts), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        answers = {"answer": [row["answer"] for row in part]}
        scored = process.score([row["prompt"] for row in part], list(texts[start : start + AT_ONCE]), answers)
        right += [total > 0.5 for total in scored.total]
        lost += sum(scored.failures.values())
    return right, lost
