"""Settings of Ray Train's worker group."""

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from lorapar_ray.grpo.engine_losses import LEAVE_LIMIT_S
from lorapar_ray.grpo.engine_supervisor import REBUILD_LIMIT_S
from lorapar_ray.train_group import WHILE_S, BeforeRestarts, LossesInAWhile, TrainGroup


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
