"""The pool of rollout engines when engines are lost; the engines are fakes whose faults are injected."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from lorapar_ray.grpo.engine_pool import LOSSES, EnginePool


class Remote:
    """What Ray makes of a method."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class Engine:
    """Dies at `start`, at `generate`, or not at all."""

    def __init__(self, name: int, dies: str) -> None:
        self.name, self.dies = name, dies
        self.start, self.generate = Remote(self._start), Remote(self._generate)

    async def _start(self) -> dict[str, int]:
        if self.dies == "start":
            raise ActorDiedError()
        return {"pid": self.name}

    async def _generate(self) -> int:
        await asyncio.sleep(0)
        if self.dies == "generate":
            raise ActorDiedError()
        return self.name


def pool_of(fates: Iterable[str], size: int, at_once: int = 4) -> EnginePool:
    engines = (Engine(name, dies) for name, dies in enumerate(fates))
    return EnginePool(lambda: next(engines), size, at_once=at_once, tolerance=0.1, time_limit_s=60)


def ask(pool: EnginePool, times: int) -> list[int]:
    async def go() -> list[int]:
        await pool.start()
        return await asyncio.gather(*(pool.run(lambda engine: engine.generate.remote()) for _ in range(times)))

    return asyncio.run(go())


def test_a_successor_that_dies_before_it_serves_is_replaced_too() -> None:
    pool = pool_of(["generate", "start", "start", "lives"], 1)
    assert ask(pool, 3) == [3, 3, 3]
    assert pool.replaced == 3


def test_engines_lost_together_are_replaced_in_their_own_places() -> None:
    pool = pool_of(["generate"] * 8 + ["lives"] * 8, 8)
    assert set(ask(pool, 16)) <= set(range(8, 16))
    assert pool.replaced == 8


def test_what_is_over_an_engines_limit_goes_to_whichever_has_room_first() -> None:
    pool = pool_of(["lives", "lives"], 2, at_once=1)

    async def answer(engine: Engine, wait: asyncio.Event, slow: bool) -> int:
        if slow:
            await wait.wait()
        return engine.name

    async def go() -> list[int]:
        await pool.start()
        wait = asyncio.Event()
        slow = asyncio.create_task(pool.run(lambda engine: answer(engine, wait, True)))
        await asyncio.sleep(0)
        fast = [await pool.run(lambda engine: answer(engine, wait, False)) for _ in range(3)]
        wait.set()
        return [await slow, *fast]

    assert asyncio.run(go()) == [0, 1, 1, 1]


def test_an_engine_never_holds_more_than_its_limit() -> None:
    pool = pool_of(["lives", "lives"], 2, at_once=3)
    holding, most = [0, 0], [0, 0]

    async def answer(engine: Engine) -> None:
        holding[engine.name] += 1
        most[engine.name] = max(most[engine.name], holding[engine.name])
        await asyncio.sleep(0.001)
        holding[engine.name] -= 1

    async def go() -> None:
        await pool.start()
        await asyncio.gather(*(pool.run(answer) for _ in range(20)))

    asyncio.run(go())
    assert most == [3, 3]


@pytest.mark.parametrize("when", ["start", "generate"])
def test_an_engine_that_is_lost_again_and_again_ends_the_run(when: str) -> None:
    pool = pool_of(["generate"] + [when] * LOSSES + ["lives"], 1)
    with pytest.raises(RuntimeError, match=f"rollout engine 0 was lost {LOSSES} times"):
        ask(pool, 1)
