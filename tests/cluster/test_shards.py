"""Stage 2's sampling in several processes: their results, and the coordinator when one of them dies."""

import asyncio
import os
from dataclasses import replace
from typing import Any

import pytest
import ray
import torch

from lorapar_ray.engines.mismatch import PolicyMismatch
from lorapar_ray.engines.policy import Policy, PolicyNote, PolicySender, note_of
from lorapar_ray.grpo.shards import Shards
from tests.cluster.test_coordinator import Engine, plan

pytestmark = pytest.mark.cluster
PROMPTS = 7
ENDLESS = 99
"""A version that never finishes loading."""


class Slow(Engine):
    """Never loads one policy."""

    async def _load(self, policy: Policy) -> str:
        if policy.version == ENDLESS:
            await asyncio.Event().wait()
        return await super()._load(policy)


class Dying(Engine):
    """Fault injection: its process ends when it gets a prompt."""

    def _rollout(self, *_: Any) -> tuple[Any, Any]:
        os._exit(1)


def shards(count: int, engine: type[Engine]) -> Shards:
    many = plan()
    many["settings"] |= {"rollout_actors": 3, "reward_workers": count}
    many["rows"] = [{**many["rows"][0], "id": str(number), "answer": str(number % 2)} for number in range(PROMPTS)]
    return Shards(many, count, engine)


def policy(version: int = 0) -> PolicyNote:
    made = PolicySender("{}").policy(version, {"m.lora_A.weight": torch.ones(4)})
    return note_of(made, made)  # the fake engines are no actors, for which Ray would fetch it


def test_groups_come_back_in_their_order_and_what_is_cancelled_has_ended(cluster: None) -> None:
    async def go() -> None:
        parts = shards(2, Slow)
        assert [told["pid"] for told in await parts.start()] == [0, 0, 0]
        await parts.load(policy(), [])
        assert await parts.prove() == 0.0
        found = await parts.groups(range(PROMPTS), 0, 0)
        assert [group.index for group in found] == list(range(PROMPTS))
        # completions are the numbers 0 and 1; one of them is the answer
        assert [group.rewards for group in found] == [[1.0, 0.0] if n % 2 == 0 else [0.0, 1.0] for n in range(PROMPTS)]
        records = ray.get([group.record for group in found])
        assert [record.token_ids.tolist() for record in records] == [[32, 33]] * PROMPTS
        counts = await parts.counts()
        assert counts.busy_seconds > 0 and (counts.replaced, counts.lost) == (0, 0)

        loading = asyncio.create_task(parts.load(policy(ENDLESS), []))
        await asyncio.sleep(0.2)
        loading.cancel()
        done, _ = await asyncio.wait([loading], timeout=20)
        assert done and loading.cancelled()
        with pytest.raises(PolicyMismatch, match="loaded"):
            await parts.load(replace(policy(1), digest="another"), [])
        for actor in parts._actors:
            ray.kill(actor)

    asyncio.run(go())


@ray.remote(max_retries=0)
def lose_a_shard() -> None:
    """As the coordinator: its shard dies while it samples."""

    async def go() -> None:
        parts = shards(1, Dying)
        await parts.start()
        await parts.load(policy(), [])
        await parts.groups(range(PROMPTS), 0, 0)

    asyncio.run(go())


def test_a_shard_that_dies_ends_its_coordinator(cluster: None) -> None:
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(lose_a_shard.remote(), timeout=100)
