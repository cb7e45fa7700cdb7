"""Whether two mathematical expressions are equal, by math-verify: only where time and memory are limited.

sympy evaluates its input: `9^{9^{9^{9}}}` would use all memory. A reward process has limits; other processes ask one.
"""

from __future__ import annotations

import atexit
import logging
import re
from functools import cache
from typing import TYPE_CHECKING

from lorapar_ray.grpo.rewards import limits

if TYPE_CHECKING:
    from lorapar_ray.grpo.rewards.pool import RewardPool

MAX_LENGTH = 1000
"""Characters of an expression that are parsed; nothing longer is equal to anything."""
TIME_LIMIT_S = 5.0
MEMORY_MB = 1024
_ENVIRONMENT = re.compile(r"\\(?:boxed|\(|\[)|\$")


def equal_expressions(gold: str, guess: str) -> bool:
    """Whether math-verify finds `guess` equal to the reference; False if that is not decided within the limits."""
    if max(len(gold), len(guess)) > MAX_LENGTH:
        return False
    if limits.in_force():
        return _verify(gold, guess)
    scored = _outside().score([""], [guess], {"gold": [gold]})
    return scored.total[0] > 0.5


def verified_expression(prompts: list[str], completions: list[str], gold: list[str], **_: object) -> list[float]:
    """`equal_expressions` as a reward, for a reward process."""
    return [float(equal_expressions(want, done)) for done, want in zip(completions, gold, strict=True)]


def load() -> None:
    """Import math-verify and sympy: seconds that must not count as a sample's own."""
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at each call without a time limit of its own


def _verify(gold: str, guess: str) -> bool:
    load()
    from math_verify import parse, verify

    # its own time limits are signals, which only a main thread may set
    ours, theirs = (parse(_as_latex(text), parsing_timeout=None) for text in (gold, guess))
    return bool(ours and theirs and verify(ours, theirs, timeout_seconds=None))


def _as_latex(text: str) -> str:
    return text if _ENVIRONMENT.search(text) else f"${text}$"


@cache
def _outside() -> RewardPool:
    """A process with limits for callers that have none; it ends with this one."""
    from lorapar_ray.grpo.rewards.pool import RewardPool, RewardSpec

    name = f"{__name__}:{verified_expression.__name__}"
    pool = RewardPool([RewardSpec(name)], time_limit_s=TIME_LIMIT_S, memory_limit_mb=MEMORY_MB)
    atexit.register(pool.close)
    return pool
