"""Placement of stage 2's engines and learners, and the end of a task that had a GPU; only the GPUs are fake (a number
given to Ray), actors, groups and processes are real."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.capacity import needing
from lorapar_ray.config import Config, EngineConfig, Resources
from lorapar_ray.engines.actor import EngineActor, start_engine
from lorapar_ray.errors import UserError
from lorapar_ray.gpus import place
from lorapar_ray.grpo.placement import reserved
from lorapar_ray.grpo.stage import STAGE
from lorapar_ray.workers import on_a_worker
from tests import local_ray
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster
GPUS = 3


@pytest.fixture(scope="module")
def gpus() -> Iterator[None]:
    import ray

    local_ray.stop()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        labels = {"group": "rollouts"}
        ray.init("local", num_cpus=5, num_gpus=GPUS, include_dashboard=False, _temp_dir=folder, labels=labels)
        yield
        ray.shutdown()


class Where(EngineActor):
    """An engine that reports its GPUs instead of starting."""

    def gpus(self) -> list[int]:
        import ray

        return [int(gpu) for gpu in ray.get_gpu_ids()]


def config(engines: int, gpus: float, learners: int = 1, learner_gpus: float = 0.0, **rest: Any) -> Config:
    grpo = {
        "rollout_actors": engines,
        "rollout_resources": {"cpus": 1, "gpus": gpus, **rest.pop("rollout", {})},
        "rollout_engine": {"tensor_parallel": max(1, int(gpus))},
        "learners": learners,
        "learner_resources": {"cpus": 0.5, "gpus": learner_gpus},
    }
    source = {"reader": "file", "path": "rows.jsonl"}
    return Config.model_validate(
        {"name": "x", "model": {"path": "m"}, "data": {"train": [source]}, "grpo": grpo, **rest}
    )


def process() -> int:
    return os.getpid()


def test_a_task_leaves_nothing_on_its_gpu(gpus: None) -> None:
    """Its process would keep the memory of a GPU that Ray counts as free; one without a GPU serves the next task."""
    with_gpu, without = (on_a_worker(process, resources=Resources(cpus=1, gpus=gpus)) for gpus in (0.5, 0))
    wait_until("the process ends", lambda: not Path(f"/proc/{with_gpu}").exists(), 60)
    assert Path(f"/proc/{without}").exists()


def room_for(tree: Config) -> AbstractContextManager[None]:
    return needing("grpo", STAGE.groups(tree))


def engine(tree: Config, place: Any) -> Any:
    return start_engine("m", EngineConfig(), tree.grpo.rollout_resources, seed=0, placement_group=place, actor=Where)


def test_engines_and_learners_share_gpus_one_of_each_on_each(gpus: None) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    tree = config(GPUS, 0.6, GPUS, 0.4)
    with reserved(tree) as place:
        engines = [engine(tree, place) for _ in range(GPUS)]
        found = ray.get([each.gpus.remote() for each in engines])
        train = placement_group([{"CPU": 0.5, "GPU": 0.4}] * GPUS)  # as Ray Train creates it
        options = {"num_cpus": 0.5, "num_gpus": 0.4, "scheduling_strategy": PlacementGroupSchedulingStrategy(train)}
        actors = [ray.remote(Where).options(**options).remote({}, "merged") for _ in range(GPUS)]
        learners = ray.get([each.gpus.remote() for each in actors])
        remove_placement_group(train)
    assert sorted(found) == sorted(learners) == [[gpu] for gpu in range(GPUS)]


def test_learners_never_share_a_gpu_though_some_have_no_engine(gpus: None) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    with reserved(config(1, 0.6, 2, 0.4)) as place:
        found = [ray.get(engine(config(1, 0.6, 2, 0.4), place).gpus.remote())]
        train = placement_group([{"CPU": 0.5, "GPU": 0.4}] * 2)
        options = {"num_cpus": 0.5, "num_gpus": 0.4, "scheduling_strategy": PlacementGroupSchedulingStrategy(train)}
        actors = [ray.remote(Where).options(**options).remote({}, "merged") for _ in range(2)]
        learners = ray.get([each.gpus.remote() for each in actors])
        remove_placement_group(train)
    assert len(found) == 1 and len(found[0]) == 1
    assert learners[0] != learners[1]


@pytest.mark.parametrize(("engines", "learners"), [(GPUS, GPUS), (1, GPUS), (1, GPUS - 1)])
def test_a_judge_anywhere_leaves_a_place_for_an_engine_and_a_learner(gpus: None, engines: int, learners: int) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    grpo = {"rewards": [{"name": "judge"}], "rollout_actors": engines, "learners": learners}
    small = {"rollout_resources": {"cpus": 0.5}, "learner_resources": {"cpus": 0.5}}
    teachers = [{"name": "a", "model": "m"}, {"name": "b", "model": "m"}]
    source = {"reader": "file", "path": "rows.jsonl"}
    tree = Config.model_validate(
        {
            **{"name": "x", "model": {"path": "m"}, "data": {"train": [source]}},
            **{"label": {"teachers": teachers, "quorum": 1}, "grpo": {**grpo, **small}},
        }
    )
    tree = place(tree, "grpo", GPUS)
    shares = [each.resources.gpu_count for each in tree.judges]
    assert all(0 < share < 1 for share in [*shares, tree.grpo.learner_resources.gpu_count])
    judges = [ray.remote(Where).options(num_cpus=0, num_gpus=share).remote({}, "merged") for share in shares]
    ray.get([each.gpus.remote() for each in judges])
    with reserved(tree) as group:
        own = [engine(tree, group) for _ in range(engines)]
        found = ray.get([each.gpus.remote() for each in own], timeout=60)
        bundles = [{"CPU": 0.5, "GPU": tree.grpo.learner_resources.gpu_count}] * learners
        train = placement_group(bundles)
        assert train.wait(60)
        options = {**{f"num_{kind.lower()}s": amount for kind, amount in bundles[0].items()}}
        inside = PlacementGroupSchedulingStrategy(train)
        actors = [
            ray.remote(Where).options(**options, scheduling_strategy=inside).remote({}, "merged")
            for _ in range(learners)
        ]
        at = ray.get([each.gpus.remote() for each in actors], timeout=60)
        remove_placement_group(train)
    for judge in judges:
        ray.kill(judge)
    for gpus_of in (found, at):
        assert len({gpu for [gpu] in gpus_of}) == len(gpus_of)


def test_a_lost_engine_finds_its_place_free(gpus: None) -> None:
    import ray

    tree = config(1, 2)
    with reserved(tree) as place:
        lost = engine(tree, place)
        assert len(ray.get(lost.gpus.remote())) == 2
        rival = ray.remote(Where).options(num_gpus=2).remote({}, "merged")
        waiting = rival.gpus.remote()
        ray.kill(lost)
        assert len(ray.get(engine(tree, place).gpus.remote(), timeout=60)) == 2
        assert not ray.wait([waiting], timeout=1)[0]
    assert len(ray.get(waiting, timeout=60)) == 2
    ray.kill(rival)


def test_no_room_is_said_at_once_or_after_the_limit(gpus: None) -> None:
    import ray

    with (
        pytest.raises(UserError, match=r"grpo: asks for 4 GPU \(rollout_actors 1 × 2, learners 1 × 2\).*has 3"),
        room_for(config(1, 2, 1, 2)),
    ):
        pass
    hog = ray.remote(Where).options(num_gpus=2).remote({}, "merged")
    ray.get(hog.gpus.remote())
    with (
        pytest.raises(UserError, match="grpo: no room for 1 rollout engines"),
        reserved(config(1, 2, cluster={"wait_s": 1})),
    ):
        pass
    ray.kill(hog)


@pytest.mark.parametrize(("engine_gpus", "learner_gpus"), [(0.5, 0.5), (0.8, 0.1), (0.7, 0.4)])
def test_shares_that_may_meet_on_one_gpu_are_refused(engine_gpus: float, learner_gpus: float) -> None:
    with pytest.raises(ValueError, match=r"give engines more than 0\.5 and learners the rest"):
        config(2, engine_gpus, 2, learner_gpus)


def test_engines_go_to_nodes_with_their_labels(gpus: None) -> None:
    import ray

    here = config(1, 1, rollout={"nodes": {"group": "rollouts"}})
    with reserved(here) as place:
        assert len(ray.get(engine(here, place).gpus.remote(), timeout=60)) == 1
    alone = start_engine("m", EngineConfig(), here.grpo.rollout_resources, seed=0, actor=Where)
    assert len(ray.get(alone.gpus.remote(), timeout=60)) == 1
    with (
        pytest.raises(UserError, match="grpo: rollout_actors asks for nodes with the label group=learners"),
        room_for(config(1, 1, rollout={"nodes": {"group": "learners"}})),
    ):
        pass
    elsewhere = config(1, 1, rollout={"nodes": {"group": "!rollouts"}})
    with pytest.raises(UserError, match="asks for nodes with the label group=!rollouts"), room_for(elsewhere):
        pass
