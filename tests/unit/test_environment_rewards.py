"""Rewards of trajectories: what reward functions get, and the environment's own."""

import asyncio
from typing import Any

import pytest

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.record import GroupHead
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.environments.calculator import rollout as calculator
from lorapar_ray.grpo.failures import Failures
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.rewards import RewardBatch, reading
from lorapar_ray.grpo.rewards.reading import Reader, Request
from lorapar_ray.grpo.rollouts import Rollouts
from lorapar_ray.models import resolve_model
from tests.unit.faked_engine import Engine, played


def test_rewards_get_the_last_answer_and_the_whole_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    record = played(calculator, Engine("It is <calc>12 * 7</calc>", "so 84.<|im_end|>"))
    monkeypatch.setattr(reading, "read_record", lambda reference: reference)
    row = {"prompt": "q", "answer": "84", "response": "84", "prompt_ids": [5, 6, 7]}
    plan = {
        "rows": [row],
        "steps": 1,
        "model": resolve_model("package:smollm2-135m-instruct"),
        "trust_remote_code": False,
    }
    answers = Reader(plan, GrpoConfig()).read(Request(0, record, 0))
    assert answers is not None and answers.completions == ["so 84."]
    [said] = answers.columns["trajectory"]
    assert said == [
        {"role": "assistant", "content": "It is <calc>12 * 7</calc>"},
        {"role": "environment", "content": " = 84\n"},
        {"role": "assistant", "content": "so 84."},
    ]
    [mask], [ids] = answers.columns["env_mask"], answers.columns["completion_ids"]
    assert len(mask) == len(ids) and sum(mask) == record.head.sampled[0]


def test_the_environments_own_reward_counts_by_its_weight_and_a_missing_one_is_counted() -> None:
    settings = GrpoConfig(
        environment="m:f", rewards=[{"name": "environment", "weight": 2.0}, {"name": "numeric_answer"}], group_size=3
    )
    head = GroupHead(3, (1, 1, 1), (True,) * 3, (0,) * 3, rewards=(1.0, None, 0.5), lost=("E: x",))

    class Rewards:
        async def score(self, index: int, record: Any, step: int) -> RewardBatch:
            return RewardBatch([0.0, 1.0, 1.0], {"numeric_answer": [0.0, 1.0, 1.0]}, {})

    rollouts = Rollouts(settings, {"rows": [], "steps": 1, "seed": 0}, [], None, Rewards())  # type: ignore[arg-type]
    group = Group(0, None, head)
    asyncio.run(rollouts.reward(group, 0))
    assert group.rewards == [2.0, 1.0, 2.0] and list(group.parts) == ["environment", "numeric_answer"]
    assert group.failed == {"environment": 1} and group.failures == 1 and group.solved == 0.5
    empty = Group(0, None, GroupHead(0, (), (), (), lost=("E: x",) * 3))
    asyncio.run(rollouts.reward(empty, 0))
    assert (empty.rewards, empty.spread, empty.solved) == ([], 0.0, 0.0)
    with pytest.raises(UserError, match=r"grpo.environment: all 3 episodes of step 1 are lost; one: E: x"):
        Failures().report([empty], 0)
