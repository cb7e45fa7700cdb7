"""The pool of rollout engines when engines are lost; the engines are fakes with injected faults."""

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, OwnerDiedError

from lorapar_ray.engines import supervisor
from lorapar_ray.engines.canaries import Canary, canary_tolerance
from lorapar_ray.engines.policy import Policy, PolicyReceiver, PolicySender, note_of
from lorapar_ray.engines.record import GroupHead
from lorapar_ray.engines.supervisor import LOSSES
from lorapar_ray.errors import UserError
from lorapar_ray.grpo import engine_pool
from lorapar_ray.grpo.engine_pool import EnginePool
from lorapar_ray.grpo.policy_proof import PolicyLost
from lorapar_ray.grpo.routing import DURATIONS
from tests.published import published


class Remote:
    """Imitates a method of a Ray actor's handle."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method

    def options(self, **_: Any) -> "Remote":
        return self


class Engine:
    """Dies at `start` or at `rollout`, is unreachable there, fails to start, starts or loads late, or `lives`."""

    may_go_on = asyncio.Event()

    def __init__(self, name: int, fate: str) -> None:
        self.name, self.fate = name, fate
        self.start, self.rollout = Remote(self._start), Remote(self._rollout)
        self.load_policy, self.score, self.cache_gap = map(Remote, (self._load_policy, self._score, self._cache_gap))
        self.receiver, self.version = PolicyReceiver(), -1
        self.holds = self.held_most = 0

    async def _start(self) -> dict[str, int]:
        if self.fate == "start":
            raise ActorDiedError()
        if self.fate == "no memory":
            raise RuntimeError("no free memory on the GPU")
        if self.fate == "late":
            await self.may_go_on.wait()
        return {"pid": self.name}

    async def _load_policy(self, policy: Policy | None, whole: Policy | None = None) -> str:
        if policy is None:
            raise OwnerDiedError("00", None, "")
        if whole is not None and self.version < 0:
            self.receiver.adapter(whole)
        self.receiver.adapter(policy)
        self.version = policy.version
        if self.fate == "late load":
            await self.may_go_on.wait()
        return policy.digest

    async def _score(self, token_ids: list[int], start: int) -> list[float]:
        return [-float(self.version)]

    async def _cache_gap(self, token_ids: list[int]) -> float:
        return 0.0

    def _rollout(self, prompt_ids: list[int], sampling: dict[str, Any], key: str, begun: Any) -> tuple[int, Any]:
        return self.name, self._head(sampling.get("until"))

    async def _head(self, until: asyncio.Event | None) -> GroupHead:
        self.holds += 1
        self.held_most = max(self.held_most, self.holds)
        await (until.wait() if until else asyncio.sleep(0))
        self.holds -= 1
        if self.fate == "rollout":
            raise ActorDiedError()
        if self.fate == "out of reach":
            raise ActorUnavailableError("", None)
        return GroupHead(1, (1,), (True,), (0,))


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The engines that were asked to leave, instead of being killed by Ray."""
    names = []

    async def leave(engine: Engine) -> None:
        names.append(engine.name)

    monkeypatch.setattr(supervisor, "leave", leave)
    return names


def pool_of(fates: Iterable[str], size: int, at_once: int = 4) -> EnginePool:
    engines = (Engine(name, fate) for name, fate in enumerate(fates))
    return EnginePool(lambda _: next(engines), size, at_once=at_once, tolerance=0.1, time_limit_s=60)


def ask(pool: EnginePool, times: int) -> list[int]:
    async def go() -> list[int]:
        await pool.start()
        return await asyncio.gather(*(answered_by(pool, str(number)) for number in range(times)))

    return asyncio.run(go())


async def answered_by(pool: EnginePool, key: str, until: asyncio.Event | None = None) -> int:
    """The engine that answers a request; with `until` it does so when that is set."""
    name: int = (await pool.rollout(key, [1], {"until": until}))[0]
    return name


def test_a_new_engine_that_dies_before_it_serves_is_replaced_too() -> None:
    pool = pool_of(["rollout", "start", "start", "lives"], 1)
    assert ask(pool, 3) == [3, 3, 3]
    assert pool.supervisor.replaced == 3


def test_an_engine_that_is_lost_at_the_first_start_is_replaced() -> None:
    pool = pool_of(["start", "lives", "start", "lives"], 2)

    async def go() -> list[int]:
        told = await pool.start()
        assert told == [{"pid": 1}]
        return [await answered_by(pool, str(number)) for number in range(4)]

    assert set(asyncio.run(go())) <= {1, 3}
    assert pool.supervisor.replaced == 2  # the first engine of one place, and the one that replaced it


def test_engines_lost_together_are_replaced_in_their_own_places() -> None:
    pool = pool_of(["rollout"] * 8 + ["lives"] * 8, 8)
    assert set(ask(pool, 16)) <= set(range(8, 16))
    assert pool.supervisor.replaced == 8


def test_requests_over_an_engines_limit_go_to_the_first_engine_with_room() -> None:
    pool = pool_of(["lives", "lives"], 2, at_once=1)

    async def go() -> list[int]:
        await pool.start()
        wait = asyncio.Event()
        slow = asyncio.create_task(answered_by(pool, "slow", wait))
        await asyncio.sleep(0)
        fast = [await answered_by(pool, "fast") for _ in range(3)]
        wait.set()
        return [await slow, *fast]

    assert asyncio.run(go()) == [0, 1, 1, 1]


def test_an_engine_never_holds_more_than_its_limit() -> None:
    pool = pool_of(["lives", "lives"], 2, at_once=3)
    assert set(ask(pool, 20)) == {0, 1}
    assert [engine.held_most for engine in pool.supervisor.engines] == [3, 3]


@pytest.mark.parametrize("when", ["start", "rollout"])
def test_an_engine_that_is_lost_again_and_again_ends_the_run(when: str, capsys: pytest.CaptureFixture[str]) -> None:
    fates = ["rollout"] + [when] * (LOSSES - 2)
    assert ask(pool_of([*fates, "lives"], 1), 1) == [LOSSES - 1]
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0].strip() for line in told] == ["rollout engine 0 was lost"] * (LOSSES - 1)
    assert all("ActorDiedError" in line and line.endswith("another one starts") for line in told)
    pool = pool_of([*fates, when, "lives"], 1)
    with pytest.raises(RuntimeError, match=f"rollout engine 0 was lost {LOSSES} times"):
        ask(pool, 1)


@pytest.mark.parametrize(("fates", "size"), [(repeat("start"), 1), (chain(["lives"], repeat("start")), 2)])
def test_a_place_that_was_given_up_fails_every_later_request_at_once(fates: Iterator[str], size: int) -> None:
    pool = pool_of(fates, size)

    async def go() -> None:
        await pool.start()
        await asyncio.wait(pool.supervisor._rebuilding.values())
        for _ in range(3):
            with pytest.raises(RuntimeError, match=f"rollout engine {size - 1} was lost {LOSSES} times"):
                async with asyncio.timeout(1):
                    await answered_by(pool, "a")
        assert pool.supervisor.replaced == LOSSES - 1 and size - 1 not in pool.supervisor.working()

    asyncio.run(go())


def test_an_extra_place_that_is_given_up_stays_empty_until_the_next_growth() -> None:
    made: list[int] = []

    def make(slot: int) -> Engine:
        made.append(slot)
        return Engine(len(made), "start" if slot else "lives")

    pool = EnginePool(make, 1, extra=1, at_once=1, tolerance=0.1, time_limit_s=60)

    async def go() -> None:
        await pool.start()
        for growths in (1, 2):
            wait = asyncio.Event()
            slow = asyncio.create_task(answered_by(pool, "slow", wait))
            await asyncio.sleep(0)
            waiting = asyncio.create_task(answered_by(pool, "waiting"))  # the only engine has no room
            pool.supervisor.grow()
            await until(lambda: not pool.supervisor._rebuilding)
            assert made.count(1) == growths * LOSSES and not waiting.done()
            wait.set()
            assert await asyncio.gather(slow, waiting) == [1, 1]
            assert pool.supervisor.working() == [0]
            await pool.supervisor.make_room()

    asyncio.run(go())


def test_the_others_continue_while_one_is_rebuilt() -> None:
    pool = pool_of(["rollout", "lives", "late"], 2)
    Engine.may_go_on = asyncio.Event()  # never set
    assert ask(pool, 6) == [1] * 6
    assert pool.supervisor.replaced == 1


@pytest.mark.parametrize("fate", ["out of reach", "no memory"])
def test_an_engine_that_may_be_alive_is_ended_before_it_is_replaced(fate: str, ended: list[int]) -> None:
    fates = ["out of reach", "lives"] if fate == "out of reach" else ["rollout", "no memory", "lives"]
    assert ask(pool_of(fates, 1), 2) == [len(fates) - 1] * 2
    assert ended == [len(fates) - 2]


@pytest.mark.parametrize("fate", ["late", "late load"])
def test_a_policy_is_published_without_the_engine_that_is_being_rebuilt(fate: str) -> None:
    pool = pool_of(["rollout", "lives", fate], 2)
    parameters = {"m.lora_A.weight": torch.zeros(4)}
    sender = PolicySender("{}", {key: value == 0 for key, value in parameters.items()})

    async def publish(version: int) -> None:
        policy = sender.policy(version, parameters)
        assert policy.kind == ("changes" if version else "whole")
        await published(pool.policy, note_of(policy, policy), [Canary([1, 2], 1, [-float(version)])])

    async def go() -> None:
        Engine.may_go_on = asyncio.Event()
        await pool.start()
        await publish(0)
        assert await answered_by(pool, "a") == 1
        await publish(1)
        assert [engine.version for engine in pool.supervisor.engines] == [0, 1]
        Engine.may_go_on.set()
        await asyncio.gather(*pool.supervisor._rebuilding.values())
        assert [(engine.name, engine.version) for engine in pool.supervisor.engines] == [(2, 1), (1, 1)]
        await publish(2)
        assert [engine.version for engine in pool.supervisor.engines] == [2, 2]

    asyncio.run(go())


@pytest.mark.parametrize("fate", ["late", "no memory"])
def test_a_policy_published_while_engines_start_waits_for_them(fate: str) -> None:
    pool = pool_of([fate], 1)
    policy = PolicySender("{}").policy(0, {"m.lora_A.weight": torch.zeros(4)})

    async def go() -> None:
        Engine.may_go_on = asyncio.Event()
        starting = asyncio.create_task(pool.start())
        await asyncio.sleep(0)
        publishing = asyncio.create_task(published(pool.policy, note_of(policy, policy), [Canary([1, 2], 1, [0.0])]))
        if fate == "no memory":  # the engines' error reaches both the starting and the waiting calls
            for waiting in (starting, publishing):
                with pytest.raises(RuntimeError, match="no free memory"):
                    await waiting
            return
        await asyncio.sleep(0.01)
        assert not publishing.done() and pool.supervisor.engines[0].version == -1
        Engine.may_go_on.set()
        assert await publishing == 0.0
        assert await starting == [{"pid": 0}]

    asyncio.run(go())


def test_a_policy_lost_with_its_learner_loses_no_engine_and_the_next_one_is_served() -> None:
    pool = pool_of(["lives", "rollout", "lives"], 2)
    sender = PolicySender("{}")

    async def publish(version: int, there: bool) -> None:
        policy = sender.policy(version, {"m.lora_A.weight": torch.zeros(4)})
        await published(pool.policy, note_of(policy, policy if there else None), [Canary([1, 2], 1, [-float(version)])])

    async def go() -> None:
        await pool.start()
        await publish(0, there=True)
        with pytest.raises(PolicyLost, match="policy 1 cannot be fetched: the learner that made it has died"):
            await publish(1, there=False)
        assert pool.supervisor.replaced == 0
        assert await asyncio.gather(answered_by(pool, "a"), answered_by(pool, "b")) == [0, 0]
        rebuilt = pool.supervisor._rebuilding[1]
        await asyncio.sleep(0.01)
        assert not rebuilt.done()  # the new engine waits for a policy that exists
        await publish(2, there=True)
        await rebuilt
        assert [engine.version for engine in pool.supervisor.engines] == [2, 2] and pool.supervisor.replaced == 1

    asyncio.run(go())


class Sampling:
    """An engine that samples one token at a time, on request; it continues tokens sampled elsewhere."""

    room = asyncio.Event()
    """Whether the cluster has room for another engine."""
    room.set()

    def __init__(self, name: int) -> None:
        self.name = name
        self.start, self.rollout, self.progress = Remote(self._start), Remote(self._rollout), Remote(self._progress)
        self.give_back = Remote(self._give_back)
        self.groups: dict[str, tuple[list[int], asyncio.Future[None]]] = {}
        self.answers, self.dead = True, False

    async def _start(self) -> dict[str, int]:
        await self.room.wait()
        return {"pid": self.name}

    def _rollout(self, prompt_ids: list[int], sampling: dict[str, Any], key: str, begun: Any) -> tuple[Any, Any]:
        if begun == "lost":
            return None, failing(OwnerDiedError("00", None, ""))
        tokens = list(begun[key] if isinstance(begun, dict) else begun or [])
        ended = asyncio.get_running_loop().create_future()
        self.groups[key] = tokens, ended

        async def head() -> GroupHead:
            await ended
            del self.groups[key]
            unfinished = () if len(tokens) == 4 else (0,)
            return GroupHead(len(prompt_ids), (len(tokens),), (True,), (0,), unfinished)

        return tokens, head()

    def grow(self, key: str, *tokens: int) -> None:
        self.groups[key][0].extend(tokens)
        if len(self.groups[key][0]) == 4:
            self.groups[key][1].set_result(None)

    def _progress(self) -> tuple[Any, Any]:
        async def lengths() -> dict[str, int]:
            if not self.answers:
                await asyncio.Event().wait()
            return {key: len(tokens) for key, (tokens, _) in self.groups.items()}

        return {key: list(tokens) for key, (tokens, _) in self.groups.items()}, lengths()

    def _give_back(self, key: str) -> None:
        if not self.groups[key][1].done():
            self.groups[key][1].set_result(None)

    def die(self) -> None:
        for _, ended in self.groups.values():
            ended.set_exception(ActorDiedError())


async def failing(error: Exception) -> None:
    raise error


async def started(size: int, time_limit_s: float = 60.0, extra: int = 0) -> tuple[EnginePool, list[Sampling]]:
    made: list[Sampling] = []

    def make(_: int) -> Sampling:
        made.append(Sampling(len(made)))
        return made[-1]

    pool = EnginePool(make, size, extra=extra, at_once=4, tolerance=0.1, time_limit_s=time_limit_s)
    await pool.start()
    return pool, made


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.002)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are checked continuously."""
    monkeypatch.setattr(engine_pool, "LOOK_S", 0.002)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_another_engine_continues_the_last_seen_tokens_of_a_dead_one(how: str) -> None:
    async def go() -> None:
        pool, made = await started(1, time_limit_s=0.05 if how == "hangs" else 60.0)
        asked = asyncio.create_task(pool.rollout("a", [1, 1], {}))
        await until(lambda: "a" in made[0].groups)
        made[0].grow("a", 5, 6)
        await until(lambda: (seen := pool._rollouts["a"].seen) is not None and seen[1] == 2)
        if how == "dies":
            made[0].die()
        else:
            made[0].answers = False
        await until(lambda: len(made) == 2 and "a" in made[1].groups)
        assert made[1].groups["a"][0] == [5, 6]
        made[1].grow("a", 7, 8)
        record, head = await asked
        assert record == [5, 6, 7, 8] and head.lengths == (4,) and pool.supervisor.replaced == 1
        await pool.stop()

    asyncio.run(go())


@pytest.mark.usefixtures("looks")
def test_a_group_that_waits_long_does_not_count_as_a_hang_while_its_engine_answers() -> None:
    async def go() -> None:
        pool, made = await started(1, time_limit_s=0.02)
        asked = asyncio.create_task(pool.rollout("a", [1, 1], {}))
        await asyncio.sleep(0.2)  # ten times the limit
        made[0].grow("a", 5, 6, 7, 8)
        assert (await asked)[0] == [5, 6, 7, 8] and pool.supervisor.replaced == 0
        await pool.stop()

    asyncio.run(go())


@pytest.mark.usefixtures("looks")
def test_a_straggler_is_given_back_once_and_an_idle_engine_continues_it() -> None:
    async def go() -> None:
        pool, made = await started(2)
        for _ in range(DURATIONS):
            pool._router.begin(1, [], 0.0)
            pool._router.end(1, 0.01, 10, 0.01)
        asked = asyncio.create_task(pool.rollout("a", [1, 1], {}))
        await until(lambda: "a" in made[0].groups)
        made[0].grow("a", 5)
        await until(lambda: "a" in made[1].groups)
        assert made[1].groups["a"][0] == [5] and not made[0].groups
        await asyncio.sleep(0.1)
        made[1].grow("a", 6, 7, 8)
        assert (await asked)[0] == [5, 6, 7, 8] and pool.supervisor.replaced == 0
        await pool.stop()

    asyncio.run(go())


@pytest.mark.usefixtures("looks")
def test_extra_engines_join_leave_and_join_again(ended: list[int]) -> None:
    """Another engine continues the groups of one that leaves; no request waits for an engine without room."""

    async def go() -> None:
        pool, made = await started(1, extra=2)
        assert len(made) == 1
        pool.supervisor.grow()
        await until(lambda: pool.supervisor.working() == [0, 1, 2])
        asked = [asyncio.create_task(pool.rollout(key, [1, 1], {})) for key in "abc"]
        await until(lambda: all(len(engine.groups) == 1 for engine in made))
        key = next(iter(made[1].groups))
        made[1].grow(key, 5, 6)
        await until(lambda: (seen := pool._rollouts[key].seen) is not None and seen[1] == 2)
        made[2].die()
        await until(lambda: len(made) == 4 and pool.supervisor.working() == [0, 1, 2] and pool.supervisor.replaced == 1)
        await pool.supervisor.make_room()
        assert pool.supervisor.working() == [0] and set(ended) == {1, 3}
        await until(lambda: len(made[0].groups) == 3)
        assert made[0].groups[key][0] == [5, 6] and pool.supervisor.replaced == 1
        Sampling.room.clear()
        pool.supervisor.grow()
        await until(lambda: len(made) == 6)
        for each in "abc":
            made[0].grow(each, *[7] * (4 - len(made[0].groups[each][0])))
        assert [head.lengths for _, head in await asyncio.gather(*asked)] == [(4,)] * 3
        assert pool.supervisor.working() == [0]
        Sampling.room.set()
        await until(lambda: pool.supervisor.working() == [0, 1, 2])
        await pool.stop()
        assert set(ended) == {0, 1, 3, 4, 5}

    asyncio.run(go())


def test_a_group_whose_tokens_are_lost_starts_again() -> None:
    async def go() -> None:
        pool, made = await started(1)
        asked = asyncio.create_task(pool.rollout("a", [1, 1], {}))
        await until(lambda: "a" in made[0].groups)
        pool._rollouts["a"].seen = "lost", 2
        made[0].die()
        await until(lambda: len(made) == 2 and "a" in made[1].groups)
        made[1].grow("a", 1, 2, 3, 4)
        assert (await asked)[0] == [1, 2, 3, 4]
        await pool.stop()

    asyncio.run(go())


def test_a_measured_tolerance_uses_the_base_without_an_adapter_and_is_bounded() -> None:
    pool = pool_of(["lives", "lives"], 2)

    async def go() -> float:
        await pool.start()
        return await pool.policy.base_gap([Canary([1, 2], 1, [1.0 - 0.03])])  # an engine without a policy returns 1.0

    gap = asyncio.run(go())
    fix = "see the dtypes"
    assert gap == pytest.approx(0.03)
    assert canary_tolerance(gap, 0.01, fix) == pytest.approx(0.24)
    assert canary_tolerance(1e-6, 0.01, fix) == 0.01
    assert canary_tolerance(0.2, 0.2, fix) == 0.5
    for wrong in (0.6, math.nan):
        with pytest.raises(UserError, match=f"do not have the same model; {fix}"):
            canary_tolerance(wrong, 0.2, fix)
