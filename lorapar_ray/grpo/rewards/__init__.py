"""Rewards: functions by name, run in separate processes.

Each process has limits of time and memory, gets no secrets of the environment, and when it ends it kills the processes
that the rewards have started. It is not a sandbox: a reward can read and write the user's files, unless it is
`isolate`d.
"""

from lorapar_ray.grpo.rewards.pool import RewardBatch, RewardPool, RewardSpec
from lorapar_ray.grpo.rewards.registry import get_reward

__all__ = ["RewardBatch", "RewardPool", "RewardSpec", "get_reward"]
