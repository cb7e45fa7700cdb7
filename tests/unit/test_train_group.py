"""Settings of Ray Train's worker group."""

from typing import Any

import pytest
import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from lorapar_ray.engines.losses import LEAVE_LIMIT_S
from lorapar_ray.engines.supervisor import REBUILD_LIMIT_S
from lorapar_ray.train_group import WHILE_S, BeforeRestarts, FixedNumber, LossesInAWhile, TrainGroup


def test_ranks_wait_for_each_other_longer_than_a_publish_waits_for_an_engine() -> None:
    settings = TrainGroup(print).backend_config
    assert settings.timeout_s >= 2 * (REBUILD_LIMIT_S + LEAVE_LIMIT_S)


def test_room_is_made_before_a_group_starts_again_and_not_before_it_starts() -> None:
    called: list[int] = []
    hook = BeforeRestarts(lambda: called.append(1))
    for calls in (0, 1, 2):
        hook.before_controller_execute_resize_decision(None)
        assert len(called) == calls


def test_losses_of_another_time_do_not_end_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lorapar_ray.train_group.time.monotonic", lambda: now[0])
    policy = LossesInAWhile(FailureConfig(max_failures=2))

    def lose(at: float) -> FailureDecision:
        now[0] = at
        return policy.make_decision(WorkerGroupError("lost", {0: RuntimeError("lost")}))

    assert {lose(number * 0.6 * WHILE_S) for number in range(9)} == {FailureDecision.RETRY}
    assert lose(7 * WHILE_S) == lose(7.1 * WHILE_S) == FailureDecision.RETRY
    assert lose(7.2 * WHILE_S) == FailureDecision.RAISE


def test_a_fixed_number_is_asked_of_no_autoscaler() -> None:
    """Ray's own policy would start an actor for that, and with it a Ray."""
    policy, nothing = FixedNumber(ScalingConfig(num_workers=3)), Any
    policy.after_controller_start(nothing)
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 3
    assert isinstance(policy.make_decision_for_running_worker_group(nothing, nothing), NoopDecision)
    policy.before_controller_abort()
    assert not ray.is_initialized()
