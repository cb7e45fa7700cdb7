"""How stage 2's engines and workers are divided among processes."""

import asyncio
import os
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.record import GroupHead
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.shards import Shards, parts_of, shard_count, too_few_shards


@pytest.mark.parametrize(
    ("engines", "rewards", "wanted"), [(1, 1, 1), (64, 8, 1), (65, 8, 2), (256, 8, 4), (256, 3, 3), (256, 1, 1)]
)
def test_there_is_a_shard_for_every_64_engines_if_each_has_a_reward_worker(
    engines: int, rewards: int, wanted: int
) -> None:
    assert shard_count(GrpoConfig(rollout_actors=engines, reward_workers=rewards)) == wanted


def test_engines_that_may_join_count_and_a_limit_is_named() -> None:
    settings = GrpoConfig(rollout_actors=64, max_rollout_actors=256, reward_workers=4)
    assert shard_count(settings) == 4 and too_few_shards(settings) is None
    few = too_few_shards(GrpoConfig(rollout_actors=256))
    assert few is not None and "need 4" in few and "get 1; raise grpo.reward_workers (1) to 4" in few
    assert too_few_shards(GrpoConfig(rollout_actors=256, rollout_shards=1)) is None


def test_every_engine_and_worker_belongs_to_one_shard() -> None:
    settings = {"rollout_actors": 5, "max_rollout_actors": 12, "reward_workers": 3, "rollout_shards": 3}
    parts = [GrpoConfig(**each["settings"]) for each in parts_of({"settings": settings, "steps": 4}, 3)]
    assert [part.rollout_actors for part in parts] == [2, 2, 1]
    assert [part.extra_rollout_actors for part in parts] == [3, 2, 2]
    assert [(part.reward_workers, part.rollout_shards) for part in parts] == [(1, 1)] * 3


def test_a_shard_without_an_engine_or_a_worker_is_refused() -> None:
    with pytest.raises(ValidationError, match="rollout_shards: 3 processes cannot share 2 engines or workers"):
        GrpoConfig(rollout_actors=4, reward_workers=2, rollout_shards=3)
    with pytest.raises(ValidationError, match="rollout_shards: 2 processes cannot share 1"):
        GrpoConfig(
            rollout_actors=4, reward_workers=2, rollout_shards=2, environment="m:f", rewards=[{"name": "environment"}]
        )


class Shard:
    """A fake of a shard's actor: answers at once, or with an error, and keeps what it was asked."""

    def __init__(self, error: RayError | None = None) -> None:
        self.error, self.asked = error, list[int]()
        self.groups = SimpleNamespace(remote=self._groups)

    async def _groups(self, indices: Sequence[int], step: int, attempt: int) -> list[Group]:
        if self.error is not None:
            raise self.error
        self.asked += indices
        return [Group(index, None, GroupHead(1, (), (), ())) for index in indices]


def shards_of(*actors: Shard) -> Shards:
    shards = Shards.__new__(Shards)  # the constructor would start actors
    shards._actors, shards._next = list(actors), 0
    return shards


def test_small_calls_reach_every_shard_and_keep_their_order() -> None:
    actors = [Shard() for _ in range(3)]
    shards = shards_of(*actors)

    async def go() -> None:
        for indices in ([0, 1], [2, 3], [4], [5], [6, 7, 8, 9, 10, 11, 12]):
            assert [group.index for group in await shards.groups(indices, 0, 0)] == indices

    asyncio.run(go())
    assert [actor.asked for actor in actors] == [[0, 3, 6, 9, 12], [1, 4, 7, 10], [2, 5, 8, 11]]


@pytest.mark.parametrize("error", [ActorDiedError(), OutOfMemoryError("the machine's memory is full")])
def test_a_shard_that_ends_for_any_reason_ends_its_coordinator(
    error: RayError, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(type(error)):
        asyncio.run(shards_of(Shard(error)).groups([0], 0, 0))
    assert ended == [1]


def test_an_error_that_a_shard_reports_does_not_end_the_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", lambda _: pytest.fail("it ended"))
    told = RayTaskError("groups", "Traceback", OutOfMemoryError("an engine's machine")).as_instanceof_cause()
    assert isinstance(told, OutOfMemoryError)
    with pytest.raises(OutOfMemoryError):
        asyncio.run(shards_of(Shard(told)).groups([0], 0, 0))
