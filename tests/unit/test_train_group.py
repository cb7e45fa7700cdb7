"""Settings of Ray Train's worker group."""

from lorapar_ray.grpo.engine_losses import LEAVE_LIMIT_S
from lorapar_ray.grpo.engine_supervisor import REBUILD_LIMIT_S
from lorapar_ray.train_group import BeforeRestarts, TrainGroup


def test_ranks_wait_for_each_other_longer_than_a_publish_waits_for_an_engine() -> None:
    settings = TrainGroup(print).backend_config
    assert settings.timeout_s >= 2 * (REBUILD_LIMIT_S + LEAVE_LIMIT_S)


def test_room_is_made_before_a_group_starts_again_and_not_before_it_starts() -> None:
    called: list[int] = []
    hook = BeforeRestarts(lambda: called.append(1))
    for calls in (0, 1, 2):
        hook.before_controller_execute_resize_decision(None)
        assert len(called) == calls
