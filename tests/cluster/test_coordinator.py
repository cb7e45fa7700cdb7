"""The coordinator when its learners die and begin again; its engine is a fake whose loading can be held up."""

import asyncio
from typing import Any

import pytest
import torch

from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.policy import Policy, PolicySender
from lorapar_ray.grpo.coordinator import Coordinator
from lorapar_ray.models import resolve_model

pytestmark = pytest.mark.cluster
MODEL = resolve_model("package:smollm2-135m-instruct")


class Method:
    """What Ray makes of a method."""

    def __init__(self, method: Any) -> None:
        self.remote = method


class Engine:
    """Loads a policy as soon as it may; answers with two different numbers under the policy it has."""

    def __init__(self) -> None:
        self.start, self.load_policy, self.generate = map(Method, (self._start, self._load, self._generate))
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.loaded: list[int] = []

    async def _start(self) -> dict[str, int]:
        return {"pid": 0}

    async def _load(self, reference: Any) -> str:
        policy: Policy = await reference
        await self.may_load.wait()
        self.loaded.append(policy.version)
        return policy.digest

    async def _generate(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[list[Completion]]:
        answers = range(2, 2 + sampling["n"])  # digits of SmolLM2's tokenizer
        version = self.loaded[-1]
        return [[Completion([30 + each], [-1.0], True, version) for each in answers] for _ in prompts]


def plan() -> dict[str, Any]:
    row = {"prompt": "Say a number.", "response": "7", "answer": "7", "prompt_ids": [1, 2, 3]}
    return {
        "settings": {"prompts_per_step": 1, "group_size": 2, "refill_limit": 0},
        "rows": [{**row, "id": str(number)} for number in range(4)],
        "steps": 3,
        "seed": 0,
        "model": MODEL,
        "trust_remote_code": False,
        "lora_rank": 8,
        "judge": None,
    }


def test_what_dead_learners_were_publishing_does_not_go_on_beside_the_next_ones(cluster: None) -> None:
    sender = PolicySender("{}")

    def policy(version: int) -> Policy:
        return sender.policy(version, {"m.lora_A.weight": torch.full((4,), float(version))})

    async def go() -> None:
        engine = Engine()
        coordinator = Coordinator(plan(), engine=lambda: engine)
        await coordinator.start()
        await coordinator.publish(policy(0), [])
        assert (await coordinator.batch(0, 0, 1)).metrics["staleness"] == 0
        engine.may_load.clear()
        given_up = asyncio.create_task(coordinator.publish(policy(1), []))
        await asyncio.sleep(0.1)
        await coordinator.resume(0, None)
        engine.may_load.set()
        with pytest.raises(RuntimeError, match="policy 1 was given up"):
            await given_up
        assert list(coordinator._steps) == []
        await coordinator.publish(policy(0), [])
        assert list(coordinator._steps) == [0]
        assert (await coordinator.batch(0, 0, 1)).metrics["staleness_max"] == 0
        coordinator._rewards.stop()

    asyncio.run(go())
