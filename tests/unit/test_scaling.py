"""What a group with a range asks for as a simulated cluster changes: the policy is real, what it sees is not."""

import socket
from itertools import count
from typing import Any

import pytest
from ray.exceptions import RaySystemError
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState

from lorapar_ray.capacity import Node
from lorapar_ray.config import Resources
from lorapar_ray.room import Others
from lorapar_ray.scaling import Look, RoomPolicy, answering


class Simulated(RoomPolicy):
    """Sees a cluster that the test describes: by node the CPUs that are free or held by the workers."""

    cpus: tuple[float, ...] = ()
    waiting = 0
    head = True

    def look(self) -> Look:
        if not self.head:
            raise RaySystemError("the head does not answer")
        return Look(tuple(Node({}, {"CPU": cpus, "GPU": 0.0}) for cpus in self.cpus), self.waiting)

    def _maybe_send_resource_request(self) -> None: ...


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    """One to four workers of a CPU each; a bundle of the others asks for two, and a spare one for half of one."""
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    worker = Resources(cpus=1)
    others = Others(None, Resources(cpus=2), ((1, Resources(cpus=0.5)),))
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0)
    return Simulated(scaling, worker, others=others)


def started(policy: Simulated, *cpus: float, waiting: int = 0) -> int:
    policy.cpus, policy.waiting = cpus, waiting
    decision: Any = policy.make_decision_for_non_running_worker_group()
    assert decision.resources_per_worker == {"CPU": 1}
    return int(decision.num_workers)


def resized(policy: Simulated, present: int, *cpus: float, waiting: int = 0) -> int | None:
    policy.cpus, policy.waiting = cpus, waiting
    nothing: Any = None
    group = DefaultPlacementGroupHandle(nothing)
    running = WorkerGroupState(float("-inf"), group, [nothing] * present, sync_actor=nothing)
    decision: Any = policy.make_decision_for_running_worker_group(running, None)
    return None if isinstance(decision, NoopDecision) else decision.num_workers


def no_place(policy: Simulated) -> None:
    """Tell the policy that the group it asked for got no place."""
    error: Any = None
    policy.after_controller_state_update(RunningState(), ReschedulingState(training_failed_error=error))


def test_a_group_starts_with_what_has_room_beside_the_others(policy: Simulated) -> None:
    assert started(policy, 2, 1.5) == 3
    assert started(policy, 2, 1) == 2  # a spare process could not start again
    assert started(policy, 3, 2, waiting=1) == 2
    assert started(policy) == 1  # for which Ray waits


def test_a_running_group_grows_and_makes_way_only_for_a_bundle(policy: Simulated) -> None:
    assert resized(policy, 2, 2.5) is None
    assert resized(policy, 2, 2.5, 1) == 3
    assert resized(policy, 2, 2, 1) is None  # left for the spare one
    assert resized(policy, 3, 3) is None  # which is no reason to start again
    assert resized(policy, 3, 3, waiting=1) == 1
    assert resized(policy, 3, 3, 2, waiting=1) is None  # Ray places it on the second node
    assert resized(policy, 2, 2, waiting=1) is None  # the last worker leaves it too little


def test_a_group_is_resized_at_intervals(policy: Simulated) -> None:
    policy.scaling_config.elastic_resize_monitor_interval_s = 1000.0
    assert resized(policy, 1, 4.5) == 4  # the group has run for long
    assert resized(policy, 1, 4.5) is None


def test_a_number_that_got_no_place_is_not_asked_for_again_on_the_same_nodes(policy: Simulated) -> None:
    assert started(policy, 4.5) == 4
    no_place(policy)
    assert started(policy, 4.5) == 3
    assert resized(policy, 3, 4.5) is None
    assert resized(policy, 3, 4.5, 0.5) == 4  # something has changed
    no_place(policy)
    assert started(policy, 1.5) == 1
    no_place(policy)
    assert started(policy, 1.5) == 1  # the fewest are waited for


def test_on_nodes_that_change_all_the_time_a_number_without_a_place_is_asked_for_again_later(policy: Simulated) -> None:
    policy.scaling_config.elastic_resize_monitor_interval_s = 1000.0
    assert started(policy, 4.5) == 4
    no_place(policy)
    assert started(policy, 4.5, 0.1) == 3
    no_place(policy)
    assert started(policy, 4.5, 0.2) == 2
    policy.scaling_config.elastic_resize_monitor_interval_s = 0.0
    no_place(policy)
    assert started(policy, 4.5, 0.3) == 4  # the pause is over


def test_pauses_begin_anew_once_as_many_workers_have_run(policy: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run on spot nodes meets many refusals; without a new beginning, one more costs most of a day."""
    clock, other = [0.0], count(0.0001, 0.0001)  # a node that always differs
    monkeypatch.setattr("lorapar_ray.scaling.time.monotonic", lambda: clock[0])
    policy.scaling_config.elastic_resize_monitor_interval_s = 60.0

    def pause(number: int) -> float:
        """Seconds for which a number is not asked for again after it got no place."""
        assert started(policy, number + 0.5, next(other)) == number
        no_place(policy)
        start = clock[0]
        while started(policy, number + 0.5, next(other)) < number:
            clock[0] += 30.0
        return clock[0] - start

    assert [pause(4) for _ in range(3)] == [120.0, 240.0, 480.0]
    assert resized(policy, 3, 3.5) is None  # three run
    assert pause(3) == 120.0  # which says nothing of four
    assert pause(4) == 60.0 * 2**5
    assert resized(policy, 4, 4.5) is None
    assert pause(4) == 120.0


def test_fewest_workers_that_got_no_place_grow_as_soon_as_there_is_room(policy: Simulated) -> None:
    policy.scaling_config.elastic_resize_monitor_interval_s = 1000.0
    assert started(policy) == 1
    no_place(policy)
    assert started(policy, 4.5) == 4


def test_a_head_that_does_not_answer_does_not_end_the_group(policy: Simulated) -> None:
    policy.head = False
    assert started(policy, 4.5) == 1
    assert resized(policy, 2, 4.5) is None
    policy.head = True
    assert resized(policy, 2, 4.5) == 4


def test_a_node_that_is_lost_without_rays_knowledge_is_not_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        ports = raylet.getsockname()[1], gone.getsockname()[1]
        nodes = [{"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port} for port in ports]
        assert answering(nodes) == nodes[:1]
