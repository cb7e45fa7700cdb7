"""Groups of workers on a cluster whose nodes come and go; the nodes are processes of one machine."""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.experimental.internal_kv import _internal_kv_get
from ray.train import ScalingConfig
from ray.util.placement_group import placement_group, remove_placement_group

from lorapar_ray.adapters.job import make_adapter
from lorapar_ray.config import Config, Resources
from lorapar_ray.evaluation.engines import REQUESTS_PER_BLOCK
from lorapar_ray.evaluation.job import evaluate_stage
from lorapar_ray.grpo.job import train_stage2
from lorapar_ray.importance.job import score_stage
from lorapar_ray.room import Others
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory
from lorapar_ray.scaling import RoomPolicy
from lorapar_ray.sft.checkpoint import last_checkpoint
from lorapar_ray.sft.job import train_stage1
from lorapar_ray.workers import run_workers
from tests.chaos import Recovery
from tests.cluster.test_scoring import make_run, same, scores_of
from tests.e2e.drawing import require_each_step_and_prompt_once
from tests.processes import below, kill_all
from tests.sft_run import ready_run
from tests.tiny_run import ENGINE, metrics, save_tiny_student, sums_in, tiny_config
from tests.together import tasks_here
from tests.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.e2e


HEAD = {"group": "head"}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The driver's node, with two cores and the label of `HEAD`; tests add others."""
    enable_token_auth_by_default()  # as a Ray that another test of this process has had: it holds for the whole process
    ensure_token_if_auth_enabled()
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    monkeypatch.setattr("lorapar_ray.workers.RESIZE_S", 1.0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "labels": HEAD})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def wait_for(condition: Callable[[], bool], thread: threading.Thread) -> None:
    """Until it holds; the thread has to live until then."""
    wait_until("the workers change", condition, 240, alive=thread.is_alive)


class Stage:
    """A stage that runs in a thread until it is stopped."""

    def __init__(self, name: str, work: Callable[[Config, RunDirectory], object], config: Config, run: RunDirectory):
        self.name, self.run = name, run
        self._work = partial(work, config, run)
        self._thread = threading.Thread(target=self._until_stopped, daemon=True)
        self._thread.start()

    def lines(self) -> list[dict[str, Any]]:
        return metrics(self.run.root, self.name)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, self._thread)

    def join(self) -> None:
        """Wait for its own end."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        kill_all("TrainController")
        self._thread.join(60)

    def _until_stopped(self) -> None:
        with suppress(ray.exceptions.RayError):
            self._work()


def stage_2(folder: Path, **settings: Any) -> Stage:
    """Stage 2 of a tiny run, which has more steps than it will make."""
    config, run = ready_run(save_tiny_student(folder / "student"), folder / "run")
    shutil.copytree(run.adapter, run.sft / "adapter")
    endless = {"steps": 100_000, "max_staleness": 1, "refill_limit": 0, "learning_rate": 1e-4}
    grpo = config.grpo.model_copy(update=endless | settings)
    return Stage("grpo", train_stage2, config.model_copy(update={"grpo": grpo}), run)


@pytest.mark.chaos("score", "worker")
def test_scoring_goes_on_with_the_workers_that_there_are(
    chance: Random, nodes: Cluster, recovery: Recovery, tmp_path: Path
) -> None:
    """One worker, which is killed once there is room for two: they end with the scores of one."""
    student = save_tiny_student(tmp_path / "student")
    by = {"resources": {"cpus": 2, "threads": 1}, "batch_tokens": 32, "unit_size": 1, "checkpoint_every_s": 0}
    alone_config, alone = make_run(student, tmp_path / "alone", **by)
    score_stage(alone_config, alone)
    config, run = make_run(student, tmp_path / "run", max_workers=2, **by)
    stage = Stage("score", score_stage, config, run)
    some = chance.randint(1, 4)
    stage.wait_for(lambda: len(sums_in(run.root)) >= some)
    [worker] = below("RayTrainWorker")
    worker.suspend()  # else it is done before the node has come
    nodes.add_node(num_cpus=2)
    before = set(sums_in(run.root))
    worker.kill()
    with recovery("score", "worker", "with another beside it"):
        stage.wait_for(lambda: set(sums_in(run.root)) > before)
    stage.join()
    since = Counter(file.parent for file in set(sums_in(run.root)) - before)
    assert max(since.values()) == 2, "one worker went on"
    same(scores_of(run), scores_of(alone))


@pytest.mark.chaos("sft", "node")
def test_stage_1_goes_on_with_the_workers_that_there_are(
    chance: Random, nodes: Cluster, recovery: Recovery, tmp_path: Path
) -> None:
    """Two workers, one after a node is lost, two again: each step's loss is that of one undisturbed worker."""
    student = save_tiny_student(tmp_path / "student")
    options = {"micro_batch_size": 4, "checkpoint_every": 5, "schedule": "constant", "warmup_ratio": 0.0}
    resources = {"cpus": 2, "threads": 1}
    config, run = ready_run(student, tmp_path / "elastic", epochs=20_000, max_workers=2, resources=resources, **options)
    checkpoints = run.work / "sft" / "checkpoints"

    def checkpoint_of(workers: int, begun: int) -> bool:
        """Whether the newest checkpoint has this number of workers, and a step after `begun`."""
        newest = last_checkpoint(checkpoints, 1)
        return newest is not None and newest[1] > begun and len([*Path(newest[0]).glob("rng-*")]) == workers

    second = nodes.add_node(num_cpus=2)
    stage, before = Stage("sft", train_stage1, config, run), chance.randint(1, 20)
    stage.wait_for(lambda: checkpoint_of(2, before))
    nodes.remove_node(second, allow_graceful=False)
    lost = len(stage.lines())
    with recovery("sft", "node"):
        stage.wait_for(lambda: checkpoint_of(1, lost))
    nodes.add_node(num_cpus=2)
    grown = len(stage.lines())
    stage.wait_for(lambda: checkpoint_of(2, grown))
    stage.stop()
    ray.shutdown()  # the end of a driver frees what its killed controller held
    ray.init(address=nodes.address, log_to_driver=False)
    lines = stage.lines()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    alone = ready_run(student, tmp_path / "alone", epochs=20_000, max_steps=len(lines), **options)
    train_stage1(*alone)
    losses = [[line["loss"] for line in metrics(each.root, "sft")] for each in (run, alone[1])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.chaos("grpo", "node")
def test_stage_2_goes_on_with_the_engines_that_there_are(
    chance: Random, nodes: Cluster, recovery: Recovery, tmp_path: Path
) -> None:
    """One engine, two once a node joins, one after its loss, two again: no step and no prompt is missing."""
    stage = stage_2(tmp_path, max_rollout_actors=2)

    def steps_by(engines: int, count: int) -> bool:
        """Whether this number of engines sampled the last `count` steps."""
        return [line["engines"] for line in stage.lines()[-count:]] == [engines] * count

    stage.wait_for(lambda: steps_by(1, 3))
    second, before = nodes.add_node(num_cpus=1), chance.randint(1, 10)
    stage.wait_for(lambda: steps_by(2, before))
    nodes.remove_node(second, allow_graceful=False)
    with recovery("grpo", "node"):
        stage.wait_for(lambda: steps_by(1, 3))
    nodes.add_node(num_cpus=1)
    stage.wait_for(lambda: steps_by(2, 3))
    kill_all("RayTrainWorker")  # the learner, which may need the room of the second engine
    stage.wait_for(lambda: steps_by(1, 1))
    stage.wait_for(lambda: steps_by(2, 3))
    stage.stop()
    lines = stage.lines()
    require_each_step_and_prompt_once(lines)
    assert lines[-1]["engines_replaced"] >= 1


@pytest.mark.chaos("grpo", "node")
def test_stage_2_goes_on_with_the_learners_that_there_are(
    chance: Random, nodes: Cluster, recovery: Recovery, tmp_path: Path
) -> None:
    """Two learners, one after a node is lost, two again; the engine, which holds a core of the head, stays the same."""
    second = nodes.add_node(num_cpus=1)
    stage = stage_2(tmp_path, max_learners=4, rollout_resources=Resources(cpus=1, nodes=HEAD))

    def steps_by(learners: int, count: int) -> bool:
        """Whether this number of learners made the last `count` steps."""
        return [line["learners"] for line in stage.lines()[-count:]] == [learners] * count

    stage.wait_for(lambda: steps_by(2, 3))
    engines = {process.pid for process in below("EngineActor")}
    before = len(stage.lines()) + chance.randint(1, 10)
    stage.wait_for(lambda: len(stage.lines()) >= before)
    nodes.remove_node(second, allow_graceful=False)
    with recovery("grpo", "node"):
        stage.wait_for(lambda: steps_by(1, 3))
    nodes.add_node(num_cpus=1)
    stage.wait_for(lambda: steps_by(2, 3))
    assert {process.pid for process in below("EngineActor")} == engines
    stage.stop()
    lines = stage.lines()
    require_each_step_and_prompt_once(lines)
    assert {line["engines"] for line in lines} == {1}


def drain(nodes: Cluster, node: Any, after_s: float) -> None:
    """Tell Ray that a node will be lost, as a cloud's notice does."""
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(1000 * (time.time() + after_s))
    accepted, why = GcsClient(address=nodes.address).drain_node(node.node_id, reason, "taken back", deadline_ms)
    assert accepted, why


@pytest.mark.long
def test_stage_1_saves_its_steps_before_a_node_is_taken_back(nodes: Cluster, tmp_path: Path) -> None:
    """Two workers, and no checkpoint is due; after the notice there are some, from which one worker goes on."""
    options = {"micro_batch_size": 4, "checkpoint_every": 10**6, "schedule": "constant", "warmup_ratio": 0.0}
    options |= {"epochs": 20_000, "max_workers": 2, "resources": {"cpus": 2, "threads": 1}}
    config, run = ready_run(save_tiny_student(tmp_path / "student"), tmp_path / "run", **options)
    second = nodes.add_node(num_cpus=2)
    stage = Stage("sft", train_stage1, config, run)
    stage.wait_for(lambda: len(stage.lines()) >= 10)
    assert len(below("RayTrainWorker")) == 2
    checkpoints = run.work / "sft" / "checkpoints"
    assert last_checkpoint(checkpoints, 1) is None
    drain(nodes, second, 40)
    scaling = ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 2})
    assert [node.labels["group"] for node in RoomPolicy(scaling, Resources(cpus=2)).look().nodes] == ["head"]
    stage.wait_for(lambda: last_checkpoint(checkpoints, 1) is not None)
    stage.wait_for(lambda: len(below("RayTrainWorker")) == 1)
    newest = last_checkpoint(checkpoints, 1)
    assert newest is not None and len([*Path(newest[0]).glob("rng-*")]) == 2
    stage.wait_for(lambda: len(stage.lines()) > newest[1] + 10)
    stage.stop()
    lines = stage.lines()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.long
def test_stage_2_saves_its_steps_before_a_node_is_taken_back(nodes: Cluster, tmp_path: Path) -> None:
    """Two learners, and no checkpoint is due; after the notice there are some, while both go on."""
    second = nodes.add_node(num_cpus=1)
    engines = {"rollout_resources": Resources(cpus=1, nodes=HEAD)}
    stage = stage_2(tmp_path, max_learners=2, checkpoint_every=10**6, **engines)

    def learners() -> list[float]:
        return [line["learners"] for line in stage.lines()]

    stage.wait_for(lambda: learners()[-3:] == [2, 2, 2])
    saved = partial((stage.run.work / "grpo").glob, "step-*")
    assert not [*saved()]
    drain(nodes, second, 300)
    stage.wait_for(lambda: len([*saved()]) == 2)  # of the last two steps
    stage.stop()
    assert set(learners()) == {2}
    require_each_step_and_prompt_once(stage.lines())


def evaluation(student: Path, folder: Path, engines: int | list[int]) -> tuple[Config, RunDirectory]:
    """A run whose adapter is evaluated, in blocks of which an engine has one at a time."""
    plain = tiny_config(student)
    plain |= {
        "data": {**plain["data"], "test": [{**source, "rows": 480} for source in plain["data"]["test"]]},
        "label": {"strategy": "random"},
        "adapter": {"rank": 4, "alpha": 8, "init": "gaussian", "init_std": 0.05},
        "evaluate": {
            "models": ["sft"],
            "max_new_tokens": 24,
            "engine": {**ENGINE, "max_num_seqs": REQUESTS_PER_BLOCK // 2},
            "engines": engines,
            "resources": {"cpus": 2, "threads": 1},
        },
    }
    config, run = Config.model_validate(plain), RunDirectory(folder)
    run.open(config)
    run_stage(config, run, "label")
    with tasks_here():
        make_adapter(config, run, run.sft / "adapter")
    return config, run


@pytest.mark.chaos("evaluate", "node")
def test_evaluation_goes_on_with_the_engines_that_there_are(
    chance: Random, nodes: Cluster, recovery: Recovery, tmp_path: Path
) -> None:
    """One engine, a second one once a node joins, the first alone after its loss: the answers are those of one."""
    student = save_tiny_student(tmp_path / "student")
    alone = evaluation(student, tmp_path / "alone", 1)
    evaluate_stage(*alone)
    config, run = evaluation(student, tmp_path / "run", [1, 2])
    stage, some = Stage("evaluate", evaluate_stage, config, run), chance.randint(1, 4)

    def answered() -> set[Path]:
        return set((run.work / "evaluate").rglob("*.parquet"))

    stage.wait_for(lambda: len(answered()) >= some)
    [first] = below("EngineCore")
    first.suspend()  # what is answered from now on is not its work, except for a block that it has just finished
    second, before = nodes.add_node(num_cpus=2), answered()
    stage.wait_for(lambda: len(answered() - before) >= 3)
    nodes.remove_node(second, allow_graceful=False)
    lost = answered()
    first.resume()
    with recovery("evaluate", "node"):
        stage.wait_for(lambda: answered() > lost)
    stage.join()
    ours, theirs = (pq.read_table(each.eval / "sft.parquet").to_pylist() for each in (run, alone[1]))
    assert len({row["completion"] for row in theirs}) > 100
    assert ours == theirs


def count_workers(argument: dict[str, Any]) -> None:
    """A worker's function: notes the number of workers, until the file `over` exists."""
    folder, workers = Path(argument["folder"]), ray.train.get_context().get_world_size()
    (folder / f"{time.time_ns()}-{workers}").touch()
    while not (folder / "over").exists():
        time.sleep(0.1)


@pytest.mark.long
def test_workers_make_way_for_a_bundle_that_lost_its_node(nodes: Cluster, tmp_path: Path) -> None:
    """The node of an engine, say, is lost: the second worker leaves its core to the engine."""
    head = placement_group([{"CPU": 2}], bundle_label_selector=[HEAD])
    assert head.wait(30)
    second = nodes.add_node(num_cpus=1)
    bundle = placement_group([{"CPU": 1}])
    assert bundle.wait(30)  # on the second node
    remove_placement_group(head)
    run, folder = RunDirectory(tmp_path / "run"), tmp_path / "counts"
    folder.mkdir()

    def work() -> None:
        others = Others(bundle, Resources(cpus=1))
        range_of = {"workers": 1, "max_workers": 2, "resources": Resources(cpus=1), "others": others}
        run_workers(count_workers, {"folder": str(folder)}, name="x", run=run, writes=[], **range_of)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def counts() -> list[int]:
        """How many workers ran, one group after the other."""
        return [count for count, _ in groupby(int(each.name.split("-")[1]) for each in sorted(folder.iterdir()))]

    def told() -> float:
        """The cores that an autoscaler is asked for."""
        request = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
        return sum(each["CPU"] for each in json.loads(request or "[]"))

    wait_for(lambda: counts() == [2], thread)
    wait_for(lambda: told() == 3, thread)  # for the most workers and the bundle
    nodes.remove_node(second, allow_graceful=False)
    wait_for(lambda: counts() == [2, 1], thread)
    assert bundle.wait(30)
    (folder / "over").touch()
    thread.join(60)
    assert not thread.is_alive()
