"""How stage 2's engines and workers are divided among processes."""

import pytest
from pydantic import ValidationError

from lorapar_ray.config import GrpoConfig
from lorapar_ray.grpo.shards import parts_of, shard_count, too_few_shards


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
