"""Rewards: functions by name, run in processes of their own.

Each process has limits of time and memory, none of the environment's secrets, and takes what the rewards have started
with it when it ends. It is no sandbox: a reward reads and writes the files that the user can, unless it is `isolate`d.
"""

from lorapar_ray.grpo.rewards.pool import RewardBatch, RewardPool, RewardSpec
from lorapar_ray.grpo.rewards.registry import get_reward

__all__ = ["RewardBatch", "RewardPool", "RewardSpec", "get_reward"]
