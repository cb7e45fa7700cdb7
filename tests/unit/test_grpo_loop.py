"""The sampling half of stage 2's loop: which groups make a step's batch, and with which advantages."""

import asyncio
from typing import Any

import pytest

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.completion import Completion
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.loop import collect
from lorapar_ray.grpo.prompt_stream import PromptStream
from lorapar_ray.grpo.rewards import RewardBatch

REWARDS = {0: [1.0, 1.0], 1: [1.0, 0.0], 2: [0.0, 0.0], 3: [0.0, 1.0]}


class ScriptedRollouts:
    """A fake: prompt k's completions are rewarded by REWARDS; notes what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.reported = 0

    async def sample(self, index: int, step: int, attempt: int) -> Group:
        self.asked.append((index, attempt))
        row = {"prompt": f"q{index}", "answer": "1", "prompt_ids": [index]}
        return Group(row, [Completion([5, 6], [-1.0, -1.0], True, step) for _ in range(2)], ["a", "b"])

    async def reward(self, group: Group, step: int) -> None:
        rewards = REWARDS[group.row["prompt_ids"][0]]
        group.take(RewardBatch(rewards, {"r": list(rewards)}, {}), GrpoConfig())

    def report_failures(self, groups: list[Group], step: int) -> None:
        self.reported = len(groups)


def collected(**settings: Any) -> tuple[Any, ScriptedRollouts, list[int]]:
    rollouts, drawn = ScriptedRollouts(), list[int]()
    stream = PromptStream(4, seed=0, order=[0, 1, 2, 3])
    stream.returned = [0, 1, 2, 3]
    config = GrpoConfig(group_size=2, prompts_per_step=2, **settings)
    batch = asyncio.run(collect(4, drawn, stream, rollouts, config))  # type: ignore[arg-type]
    return batch, rollouts, drawn


def test_groups_that_teach_nothing_are_replaced_and_advantages_follow_the_rewards() -> None:
    batch, rollouts, drawn = collected(refill_limit=2)
    assert rollouts.asked == [(0, 0), (1, 0), (2, 1), (3, 2)] and drawn == [0, 1, 2, 3] and rollouts.reported == 4
    assert [sample.prompt_ids for sample in batch.samples] == [[1], [1], [3], [3]]
    signs = [sample.advantage > 0 for sample in batch.samples]
    assert signs == [True, False, False, True] and sum(each.advantage for each in batch.samples) == pytest.approx(0)
    assert (batch.count, batch.tokens, batch.prompts) == (4, 8, [0, 1, 2, 3])
    assert batch.metrics["reward"] == 0.5 and batch.metrics["zero_variance_share"] == 0.5


def test_without_refills_a_step_trains_on_what_there_is() -> None:
    batch, _, drawn = collected(refill_limit=0)
    assert drawn == [0, 1] and [sample.prompt_ids for sample in batch.samples] == [[1], [1]]
