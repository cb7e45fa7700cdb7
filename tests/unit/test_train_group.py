"""Settings of Ray Train's group of workers."""

from lorapar_ray.grpo.engine_losses import LEAVE_LIMIT_S
from lorapar_ray.grpo.engine_pool import REBUILD_LIMIT_S
from lorapar_ray.train_group import TrainGroup


def test_ranks_wait_for_each_other_longer_than_a_publish_waits_for_an_engine() -> None:
    settings = TrainGroup(print).backend_config
    assert settings.timeout_s >= 2 * (REBUILD_LIMIT_S + LEAVE_LIMIT_S)
