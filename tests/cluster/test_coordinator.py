"""The coordinator when its learners die and restart; its engine is a fake whose loading can be delayed."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import ray
import torch

from lorapar_ray.config import Config, TeacherConfig
from lorapar_ray.engines.canaries import Canary
from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.mismatch import PolicyMismatch
from lorapar_ray.engines.policy import Policy, PolicyNote, PolicySender, note_of
from lorapar_ray.engines.record import record_of
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.coordinator import Coordinator
from lorapar_ray.grpo.environments.actor import EnvironmentWorkers
from lorapar_ray.grpo.environments.registry import get_environment
from lorapar_ray.grpo.rewards.judge import judging
from lorapar_ray.labeling.teachers import Asked, ShutOut
from lorapar_ray.models import resolve_model

pytestmark = pytest.mark.cluster
MODEL = resolve_model("package:smollm2-135m-instruct")


class Method:
    """Imitates a method of a Ray actor's handle."""

    def __init__(self, method: Any) -> None:
        self.remote = method

    def options(self, **_: Any) -> "Method":
        return self


class Engine:
    """Loads a policy when allowed; samples two different numbers under its current policy."""

    def __init__(self, slot: int = 0) -> None:
        self.start, self.load_policy, self.rollout = map(Method, (self._start, self._load, self._rollout))
        self.score, self.cache_gap = Method(self._score), Method(self._cache_gap)
        self.scores: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """The log-probability that it gives a canary, once it may answer."""
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.loaded: list[int] = []

    async def _start(self) -> dict[str, int]:
        return {"pid": 0}

    async def _load(self, policy: Policy) -> str:
        await self.may_load.wait()
        self.loaded.append(policy.version)
        return policy.digest

    async def _score(self, token_ids: list[int], start: int) -> list[float]:
        return [await self.scores]

    async def _cache_gap(self, token_ids: list[int]) -> float:
        return 0.0

    def _rollout(self, prompt_ids: list[int], sampling: dict[str, Any], key: str, begun: Any) -> tuple[Any, Any]:
        answers = range(2, 2 + sampling["n"])  # the digits 0 and 1 are 32 and 33
        version = self.loaded[-1]
        record = record_of(prompt_ids, [Completion([30 + each], [-1.0], True, version) for each in answers])
        return ray.put(record), ray.put(record.head)


def plan() -> dict[str, Any]:
    row = {"prompt": "Say a number.", "response": "1", "answer": "1", "prompt_ids": [1, 2, 3]}
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


def test_a_balanced_steps_prompts_follow_the_time_that_steps_take(cluster: None) -> None:
    sender = PolicySender("{}")

    async def go() -> None:
        balanced = plan()
        balanced["settings"] |= {"balance": "auto", "balance_prompts": [1, 3], "steps": 5}
        balanced["steps"] = 5
        coordinator = Coordinator(balanced, engine=Engine)
        await coordinator.start()
        begun = []
        for version in range(4):
            policy = sender.policy(version, {"m.lora_A.weight": torch.full((4,), float(version))})
            figures = await coordinator.publish(note_of(policy, policy), [])
            share = await coordinator.batch(version, 0, 1)
            begun.append(figures["prompts_per_step"])
            assert len(share.prompts) == begun[-1]
        assert begun[:3] == [1, 1, 2]  # the first step's time includes the start; then another size is tried
        saved = await coordinator.checkpoint(3)
        await coordinator.resume(3, saved)
        assert await coordinator.checkpoint(3) == saved and len(saved["balance"]) == 3
        coordinator._sampler._rewards.stop()

    asyncio.run(go())


class Engines:
    """A pool with one engine, which gets no request."""

    async def episodes(self, prompt_ids: Any, play: Any) -> tuple[Any, Any]:
        record, head = play(None)
        return record, await head


def test_a_blocked_environment_worker_is_replaced(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapar_ray.grpo.environments.actor.CRASHES", 1)
    blocking = plan()
    blocking["settings"] |= {"environment": "tests.cluster.blocking:blocks", "environment_time_limit_s": 0.5}

    async def go() -> None:
        workers = EnvironmentWorkers(blocking)
        sampling = {"n": 2, "seed": 0}
        _, head = await workers.play(Engines(), "a", 0, [1, 2, 3], sampling)  # type: ignore[arg-type]
        assert len(head.lost) == 2 and "its worker died" in head.lost[0] and head.lengths == ()
        reference, head = await workers.play(Engines(), "b", 1, [1, 2, 3], sampling)  # type: ignore[arg-type]
        assert len(head.lost) == 2 and "the policy sampled nothing" in head.lost[0]
        record = await reference
        assert record.completions() == [] and record.head == head
        workers.stop()

    asyncio.run(go())


def test_publishing_of_dead_learners_ends_before_the_next_ones(cluster: None) -> None:
    sender = PolicySender("{}")

    def policy(version: int) -> PolicyNote:
        policy = sender.policy(version, {"m.lora_A.weight": torch.full((4,), float(version))})
        return note_of(policy, policy)

    async def go() -> None:
        engine = Engine()
        coordinator = Coordinator(plan(), engine=lambda _: engine)
        await coordinator.start()
        asked = asyncio.create_task(coordinator.batch(0, 0, 1))  # before the policy that it waits for
        await asyncio.sleep(0)
        await coordinator.publish(policy(0), [])
        share = await asked
        assert share.metrics["staleness"] == 0
        [part] = share.updates[0].parts
        record = ray.get(part.record)
        assert (record.token_ids.tolist(), record.head.lengths, part.completions) == ([32, 33], (1, 1), [0, 1])
        await coordinator.lost(0, [part.group])  # sampled again, with another reference
        [again] = (await coordinator.batch(0, 0, 1)).updates[0].parts
        assert again.record != part.record and ray.get(again.record).token_ids.tolist() == [32, 33]
        engine.may_load.clear()
        given_up = asyncio.create_task(coordinator.publish(policy(1), []))
        await asyncio.sleep(0.1)
        await coordinator.resume(0, None)
        engine.may_load.set()
        with pytest.raises(RuntimeError, match="policy 1 was discarded"):
            await given_up
        assert list(coordinator._steps) == []
        figures = await coordinator.publish(policy(0), [])
        assert list(coordinator._steps) == [0] and figures["groups_lost"] == 1
        assert (await coordinator.batch(0, 0, 1)).metrics["staleness_max"] == 0
        waiting = asyncio.create_task(coordinator.batch(1, 0, 1))
        with pytest.raises(PolicyMismatch):
            await coordinator.publish(replace(policy(1), digest="another"), [])
        with pytest.raises(PolicyMismatch):  # so does the wait for a step that cannot begin
            await waiting
        coordinator._sampler._rewards.stop()

    asyncio.run(go())


def test_a_dead_learners_call_deals_nothing_to_the_next_learners(cluster: None) -> None:
    """Its group had another number of learners; Ray does not end its call."""
    policy = PolicySender("{}").policy(0, {"m.lora_A.weight": torch.ones(4)})
    both = plan()
    both["settings"] |= {"prompts_per_step": 2}

    async def go() -> None:
        coordinator = Coordinator(both, engine=Engine)
        await coordinator.start()
        old = asyncio.create_task(coordinator.batch(0, 0, 1))
        await asyncio.sleep(0.01)
        await coordinator.resume(0, None)
        new = [asyncio.create_task(coordinator.batch(0, rank, 2)) for rank in range(2)]
        await coordinator.publish(note_of(policy, policy), [])
        with pytest.raises(RuntimeError, match="step 0 was discarded: the learners have restarted"):
            await old
        shares = await asyncio.gather(*new)
        parts = [part for share in shares for update in share.updates for part in update.parts]
        assert sorted((part.group, each) for part in parts for each in part.completions) == [
            *((0, 0), (0, 1), (1, 0), (1, 1))
        ]
        coordinator._sampler._rewards.stop()

    asyncio.run(go())


class Silent:
    """Fault injection: a teacher whose key has expired."""

    def __init__(self, teacher: TeacherConfig) -> None:
        """Takes no setting."""

    async def ask(self, prompt: str, choices: list[str]) -> Asked:
        raise ShutOut("status 401: the key has expired")


def test_a_judge_that_grades_nothing_ends_the_step(cluster: None) -> None:
    sender = PolicySender("{}")
    judged = plan()
    judged["settings"] |= {"rewards": [{"name": "numeric_answer"}, {"name": "judge"}]}
    teacher = {"name": "a", "kind": "python", "model": f"{__name__}:Silent"}
    config = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"reader": "file", "path": "r"}]}}
    config |= {"label": {"teachers": [teacher]}, "grpo": judged["settings"]}

    async def go() -> None:
        coordinator = Coordinator(judged, engine=Engine)
        await coordinator.start()
        policy = sender.policy(0, {"m.lora_A.weight": torch.ones(4)})
        await coordinator.publish(note_of(policy, policy), [])
        with pytest.raises(
            UserError, match=r"'judge' failed on all 2 samples of step 1: no teacher .*the key has expired"
        ):
            await coordinator.batch(0, 0, 1)
        coordinator._sampler._rewards.stop()

    with judging(Config.model_validate(config)) as judged["judge"]:
        asyncio.run(go())


@pytest.mark.parametrize("served", [-1.0, -2.0])
def test_sampling_begins_before_the_proof_and_is_used_only_after_it(cluster: None, served: float) -> None:
    policy = PolicySender("{}").policy(0, {"m.lora_A.weight": torch.ones(4)})

    async def go() -> None:
        engine = Engine()
        coordinator = Coordinator(plan(), engine=lambda _: engine)
        await coordinator.start()
        publishing = asyncio.create_task(coordinator.publish(note_of(policy, policy), [Canary([1, 2], 1, [-1.0])]))
        share = await coordinator.batch(0, 0, 1)
        assert not publishing.done()  # a learner waits for it before its update; see `Publisher.wait`
        engine.scores.set_result(served)
        if served == -1.0:
            assert (await publishing)["canary_gap"] == 0 and share.metrics["staleness"] == 0
        else:
            with pytest.raises(PolicyMismatch, match="does not serve policy 0"):
                await publishing
            with pytest.raises(PolicyMismatch):
                await coordinator.batch(0, 0, 1)
        coordinator._sampler._rewards.stop()

    asyncio.run(go())


def test_an_environment_that_only_a_worker_cannot_import_stops_the_run(cluster: None) -> None:
    """Ray makes an actor with async methods outside of the main thread."""
    name = "tests.cluster.only_on_the_main_thread:rollout"
    get_environment(name)
    elsewhere = plan()
    elsewhere["settings"] |= {"environment": name}

    async def go() -> None:
        workers = EnvironmentWorkers(elsewhere)
        with pytest.raises(UserError) as refusal:
            await workers.play(Engines(), "a", 0, [1, 2, 3], {"n": 2, "seed": 0})  # type: ignore[arg-type]
        workers.stop()
        told = str(refusal.value.cause)  # type: ignore[attr-defined]  # Ray's; its own text has the worker's traceback
        assert told.startswith(f"grpo.environment: '{name}' cannot be imported (RuntimeError: not here)")

    asyncio.run(go())
