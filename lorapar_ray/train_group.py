"""Ray Train's group of workers, without unused helper actors, on the network that Ray itself uses.

It does what Ray's `TorchTrainer` does. That one imports torch wherever it is, two seconds of a core: also on the driver
and in Ray's controller, for which every stage waits. Here only the workers import it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train import FailureConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from lorapar_ray.network import COLLECTIVE_LIMIT_S, meet_on_rays_interface

UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Each is an actor, which takes two seconds of a core at every start. Workers read their own files, not Ray's datasets;
and Ray itself frees a group's resources when the driver ends, as it does if the controller dies."""
WHILE_S = 2 * 3600.0
"""A loss longer ago does not count any more."""
LEAVE_LIMIT_S = 30
"""For workers to leave their process group when the work is done."""

logger = logging.getLogger(__name__)


class BeforeRestarts(ControllerCallback):
    """Calls a function, on the driver's machine, before a group takes its resources again: all but the first time."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._begun = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if self._begun:
            self._call()
        self._begun = True


class ProcessGroup(Backend):
    """A process group of torch over the workers, as Ray's own backend makes it; in the controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        worker_group.execute(_join, address, port, "nccl" if gpus else "gloo", backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        try:
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=LEAVE_LIMIT_S)
        except GetTimeoutError:
            logger.warning("workers have not left their process group within %s s", LEAVE_LIMIT_S)


def _join(address: str, port: int, backend: str, timeout_s: int) -> None:
    """Connect this worker with the others, which do the same; the first one listens at `address`."""
    import ray.train
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    meet_on_rays_interface()
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    _set_torch_distributed_env_vars()
    mine = ray.train.get_context()
    _setup_torch_process_group(backend, mine.get_world_rank(), mine.get_world_size(), "env://", timeout_s)


def _leave(destroy: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy)


class OnItsGpu:
    """Context of a worker's function: its GPU, if it has one, is torch's default."""

    def __enter__(self) -> None:
        from ray.train.torch.config import TorchConfigContextManager

        TorchConfigContextManager().__enter__()

    def __exit__(self, *_: object) -> None: ...


class FixedNumber(FixedScalingPolicy):
    """Always the same number of workers, for a Ray that nothing can make larger: it tells no autoscaler what it needs.

    Ray's own policy tells an actor, which takes two seconds of a core to start, and the group waits for it.
    """

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


@dataclass
class Torch(BackendConfig):
    """What the controller has to know."""

    timeout_s: int = COLLECTIVE_LIMIT_S

    @property
    def backend_cls(self) -> type[ProcessGroup]:
        return ProcessGroup

    @property
    def train_func_context(self) -> type[OnItsGpu]:
        return OnItsGpu

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH


class TrainGroup(DataParallelTrainer):
    """A group without `UNUSED`, whose processes meet on Ray's network."""

    def __init__(self, *arguments: Any, policy: ScalingPolicy | None = None, **options: Any) -> None:
        """`policy` decides on the number of workers; None: Ray's for a fixed number."""
        super().__init__(*arguments, backend_config=Torch(), **options)
        self._policy = policy

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, UNUSED)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        own = {"failure_policy": LossesInAWhile(self.run_config.failure_config)}
        if self._policy is not None:
            own["scaling_policy"] = self._policy
        return super()._initialize_and_run_controller(**parts | own)


class LossesInAWhile(DefaultFailurePolicy):
    """Ends a group after too many losses within `WHILE_S`, not in all: a run of days loses a machine now and then.

    What fails again and again does so within the time between two checkpoints and a start, so it ends soon.
    """

    def __init__(self, failure_config: FailureConfig) -> None:
        super().__init__(failure_config)
        self._lost_at: list[float] = []

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        now = time.monotonic()
        self._lost_at = [each for each in self._lost_at if now - each < WHILE_S]
        self._worker_group_failures = len(self._lost_at)
        decision = super().make_decision(training_failed_error)
        if self._worker_group_failures > len(self._lost_at):
            self._lost_at.append(now)
        return decision
