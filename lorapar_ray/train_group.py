"""Ray Train's group of workers, without the helpers that nothing here uses."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Each is an actor, and so two seconds of a core at every start. Workers read their own files, not Ray's datasets; and
Ray itself removes a group's resources when the driver ends, which a dead controller makes it do."""


class TrainGroup(TorchTrainer):
    """`TorchTrainer` without `UNUSED`."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, UNUSED)]
