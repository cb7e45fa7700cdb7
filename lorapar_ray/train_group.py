"""Ray Train's group of workers, without unused helper actors, on the network that Ray itself uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback

from lorapar_ray.network import meet_on_rays_interface

UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Each is an actor, which takes two seconds of a core at every start. Workers read their own files, not Ray's datasets;
and Ray itself frees a group's resources when the driver ends, as it does if the controller dies."""
COLLECTIVE_LIMIT_S = 7200
"""Time limit of one collective operation, for gloo and NCCL. Ranks wait in one while rank 0 publishes a policy, which
may take half an hour for an engine to be rebuilt; a dead rank is found by Ray, not by this."""


class BeforeRestarts(ControllerCallback):
    """Calls a function, on the driver's machine, before a group takes its resources again: all but the first time."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._begun = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if self._begun:
            self._call()
        self._begun = True


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(meet_on_rays_interface)
        super().on_start(worker_group, backend_config)


class _Torch(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


class TrainGroup(TorchTrainer):
    """`TorchTrainer` without `UNUSED`, whose processes meet on Ray's network."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, torch_config=_Torch(timeout_s=COLLECTIVE_LIMIT_S), **options)

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, UNUSED)]
