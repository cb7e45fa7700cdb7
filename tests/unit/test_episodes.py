"""What a failed, late, cancelled or stranded episode loses."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from lorapar_ray.engines.record import GroupHead, GroupRecord
from lorapar_ray.grpo.engine_pool import EnginePool
from lorapar_ray.grpo.environments import Trajectory, TurnEngine
from lorapar_ray.grpo.environments.calculator import rollout as calculator
from lorapar_ray.grpo.environments.episodes import LEFT, EpisodeGroup
from tests.unit.faked_engine import LIMITS, Engine, Method, adds, answered, encoder, plain, played, rewards


def begins(prompt: list[int]) -> Callable[..., Awaitable[Trajectory]]:
    """An environment with a prompt of its own."""

    async def rollout(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        trajectory = engine.begin(prompt)
        await engine.generate(trajectory)
        return trajectory

    return rollout


async def never_full(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    trajectory = engine.begin(row["prompt_ids"])
    while True:
        await engine.generate(trajectory)


async def silent(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    return engine.begin(row["prompt_ids"])


async def no_trajectory(engine: TurnEngine, row: dict[str, Any]) -> Any:
    return "42"


async def hangs(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    trajectory = engine.begin(row["prompt_ids"])
    await engine.generate(trajectory)
    await asyncio.Event().wait()
    return trajectory


async def leaves(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    raise SystemExit(3)


async def cancels(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    own = asyncio.ensure_future(asyncio.Event().wait())
    own.cancel()
    await own
    return engine.begin(row["prompt_ids"])


async def cancels_itself(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    own = asyncio.current_task()
    assert own is not None
    own.cancel()
    await asyncio.Event().wait()
    return engine.begin(row["prompt_ids"])


@pytest.mark.parametrize(
    ("rollout", "told"),
    [
        (adds([5, 200_000]), "'200000' is not one of the model's 49152 tokens"),
        (adds([-1]), "'-1' is not one of the model's 49152 tokens"),
        (adds("text"), "'t' is not one of the model's 49152 tokens"),
        (adds(np.array([1.5], np.float32)), "'1.5' is not one of the model's 49152 tokens"),
        (begins([5, 49152]), "'49152' is not one of the model's 49152 tokens"),
        (never_full, "all 64 tokens of grpo.max_completion_length"),
        (adds([5] * 1000), "all 64 tokens of grpo.max_completion_length"),
        (begins([5] * 17), "a prompt of 17 tokens; 1 to 16 are allowed (grpo.max_prompt_length)"),
        (begins([]), "a prompt of 0 tokens; 1 to 16 are allowed (grpo.max_prompt_length)"),
        (silent, "the policy sampled nothing"),
        (rewards([1.0, 0.0]), "its reward is [1.0, 0.0]; give one finite number, or None"),
        (rewards([]), "its reward is []; give one finite number, or None"),
        (rewards(torch.ones(1)), "its reward is tensor([1.]); give one finite number, or None"),
        (rewards(float("nan")), "its reward is nan; give one finite number, or None"),
        (rewards("good"), "its reward is good; give one finite number, or None"),
        (no_trajectory, "it returns str, not the trajectory"),
        (hangs, "longer than grpo.environment_time_limit_s (0.05)"),
        (leaves, "SystemExit: 3"),
        (cancels, "CancelledError: it awaits a task that was cancelled"),
        (cancels_itself, "CancelledError: it cancels its own task"),
    ],
)
def test_a_failed_episode_loses_only_its_sample(rollout: Any, told: str) -> None:
    episodes = iter([rollout, calculator, calculator])

    async def either(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        found: Trajectory = await next(episodes)(engine, row)
        return found

    record = played(either, Engine("one word"), samples=3, time_limit_s=0.05 if rollout is hangs else 5.0)
    [lost] = record.head.lost
    assert told in lost and len(record.head.lengths) == len(record.completions()) == 2


@pytest.mark.parametrize("asks", [False, True])
def test_an_episode_that_swallows_its_cancellation_loses_only_its_sample(asks: bool) -> None:
    """It waits again, or asks the engine again, after every error."""
    running, cancelled, first = True, 0, iter([True])

    async def stubborn(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        nonlocal cancelled
        if next(first, False):
            trajectory = engine.begin(row["prompt_ids"])
            while running:
                try:
                    await (engine.generate(trajectory) if asks and cancelled else asyncio.Event().wait())
                except BaseException:
                    cancelled += 1
            return trajectory
        return await calculator(engine, row)

    async def go() -> GroupRecord:
        nonlocal running
        sampling = {"n": 3, "seed": 7, "temperature": 1.0, "stop": []}
        group = EpisodeGroup("k", stubborn, {"prompt_ids": [5]}, encoder(), LIMITS, sampling, 0.05)
        group.move_to(Engine("one word"))
        record = await asyncio.wait_for(group.play(), 60)
        assert len(LEFT) == 1
        running = False
        return record

    record = asyncio.run(go())
    [lost] = record.head.lost
    assert "longer than grpo.environment_time_limit_s (0.05)" in lost and len(record.head.lengths) == 2
    assert cancelled > 1 and not LEFT


def test_an_episode_may_return_what_it_has_when_its_time_is_up() -> None:
    async def careful(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        trajectory = engine.begin(row["prompt_ids"])
        await engine.generate(trajectory)
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return trajectory

    head = played(careful, Engine("one word"), time_limit_s=0.05).head
    assert (head.lost, len(head.lengths)) == ((), 1)


def test_an_episode_that_is_cancelled_from_outside_is_no_lost_sample() -> None:
    async def begun_and_cancelled() -> None:
        begun = asyncio.Event()

        async def waits(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
            begun.set()
            await asyncio.Event().wait()
            return engine.begin(row["prompt_ids"])

        group = EpisodeGroup("k", waits, {"prompt_ids": [5]}, encoder(), LIMITS, {"n": 1, "seed": 1}, 60.0)
        playing = asyncio.create_task(group._episode(0))
        await begun.wait()
        playing.cancel()
        await playing

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(begun_and_cancelled())


def test_episodes_continue_on_another_engine_from_the_lost_turn() -> None:
    dying, next_one = Engine("a <calc>1+1</calc>", "b", version=1, dies=3), Engine("a", "b<|im_end|>", version=2)
    engines = iter([dying, next_one])
    started: list[Engine] = []

    def start(_: int) -> Any:
        engine = next(engines)
        engine.start = Method(lambda: answered({"pid": 0}))
        engine.leave = Method(lambda: answered(None))
        started.append(engine)
        return engine

    calls: list[Engine] = []

    async def go() -> GroupHead:
        pool = EnginePool(start, 1, at_once=8, tolerance=1.0, time_limit_s=60)
        await pool.start()
        sampling = {"n": 2, "seed": 7, "stop": []}
        group = EpisodeGroup("k", calculator, {"prompt_ids": [5, 6, 7]}, encoder(), LIMITS, sampling, 5.0)
        playing = asyncio.create_task(group.play())

        async def head(engine: Engine) -> Any:
            calls.append(engine)
            group.move_to(engine)
            stranded = asyncio.create_task(group.stranded.wait())
            await asyncio.wait({playing, stranded}, return_when=asyncio.FIRST_COMPLETED)
            stranded.cancel()
            return playing.result().head if playing.done() else GroupHead(0, (), (), (), open=(0,))

        pool_patch = pytest.MonkeyPatch()
        pool_patch.setattr("lorapar_ray.engines.supervisor.leave", lambda engine: answered(None))
        try:
            return (await pool.episodes([5, 6, 7], lambda engine: (None, head(engine))))[1]
        finally:
            pool_patch.undo()
            for task in pool._watches:
                task.cancel()

    head = asyncio.run(go())
    assert calls == [dying, next_one] and head.turns == (2, 2) and head.lost == ()
    assert [ids[:3] for _, ids, _ in next_one.asked] == [[5, 6, 7]] * 2
    assert head.versions == (1, 1)  # of the first turn, which the bound on staleness uses
    assert {len(ids) for _, ids, _ in next_one.asked} == {3 + len(plain("a <calc>1+1</calc>")) + len(plain(" = 2\n"))}
