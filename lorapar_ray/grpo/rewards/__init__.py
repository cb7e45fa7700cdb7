"""Rewards: functions by name, run where they can do no harm."""

from lorapar_ray.grpo.rewards.pool import RewardBatch, RewardPool, RewardSpec
from lorapar_ray.grpo.rewards.registry import get_reward

__all__ = ["RewardBatch", "RewardPool", "RewardSpec", "get_reward"]
