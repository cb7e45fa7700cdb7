"""Rewards by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lorapar_ray.boundary import imported
from lorapar_ray.config import ENVIRONMENT, JUDGE, REWARDED_ELSEWHERE
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.rewards import code, functions
from lorapar_ray.grpo.rewards.code import CODE_TESTS
from lorapar_ray.sandbox import choose

if TYPE_CHECKING:
    from lorapar_ray.config import GrpoConfig

RewardFunction = Callable[..., list[float]]

NAMES = (
    "numeric_answer",
    "exact_answer",
    "option_letter",
    "integer_answer",
    "strict_format",
    "soft_format",
    "tag_count",
    "reference_overlap",
    CODE_TESTS,
)


def get_reward(name: str) -> RewardFunction:
    """A registered reward, or any function given as `module:function`.

    Raises:
        UserError: there is no such reward.
    """
    if name == CODE_TESTS:
        return code.code_tests
    if name in NAMES:
        found: RewardFunction = getattr(functions, name)
        return found
    if ":" not in name:
        known = ", ".join((*NAMES, JUDGE, ENVIRONMENT))
        raise UserError(f"grpo.rewards: '{name}' is unknown; use {known} or module:function")
    loaded: RewardFunction = imported(name, f"grpo.rewards: '{name}'")
    return loaded


def require_rewards(settings: GrpoConfig) -> None:
    """Check that every reward of `grpo.rewards` can be imported, and that the sandbox works if one needs it.

    Raises:
        UserError: see `get_reward` and `lorapar_ray.sandbox.choose`.
    """
    if any(reward.isolate or reward.name == CODE_TESTS for reward in settings.rewards):
        choose(settings.sandbox.layer)
    for reward in settings.rewards:
        if reward.name not in REWARDED_ELSEWHERE:
            get_reward(reward.name)
