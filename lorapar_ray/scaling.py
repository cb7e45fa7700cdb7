"""How many workers a Ray Train group with a range has: as many as there is room for beside everything else.

Ray's own policy counts what nodes have, not what is free on them. So it asks for workers that never get a place where
other processes hold a part of the cluster: stage 2's engines, or another job. A group that starts with too many waits
for a minute, and then the next try is the same.

Here a group's room is what is free now and what the group holds itself. Processes of the same stage come first: those
that hold bundles of a placement group, which Ray moves to other nodes after a loss, and those that ask Ray alone. A
running group is made smaller only for a bundle that waits.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.util.placement_group import placement_group_table

from lorapar_ray.capacity import Node
from lorapar_ray.config import Resources
from lorapar_ray.room import Others, Waiting, workers_with_room

ANSWER_LIMIT_S = 3.0
"""For a node to accept a connection."""
AT_ONCE = 32
"""Nodes that are asked at the same time."""
MOST_DOUBLED = 10
"""Limit of the doublings of a pause, so that it stays below a day."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """The cluster as it is now."""

    nodes: tuple[Node, ...]
    """With what is free on each, and what the workers hold there."""
    waiting: int = 0
    """Bundles of `Others.group` without a place."""


class RoomPolicy(ScalingPolicy):
    """In the controller: decides on the number of workers when a group starts, and at intervals while it runs."""

    def __init__(self, scaling_config: Any, worker: Resources, multiple: int = 1, others: Others | None = None) -> None:
        """Store the range.

        Args:
            scaling_config: Ray Train's, with the range and the interval.
            worker: what a worker asks for.
            multiple: divides the number of workers.
            others: the rest of the stage.
        """
        super().__init__(scaling_config)
        self._worker, self._multiple, self._others = worker, multiple, others or Others()
        self._group: Any = None
        """The placement group of the workers that ran last."""
        self._for_bundles: Any = None
        """Tells an autoscaler of the bundles."""
        self._looked_at = float("-inf")
        self._asked: tuple[int, tuple[Node, ...]] | None = None
        """The number that was last asked for, and the nodes at that time."""
        self._too_many: tuple[int, tuple[Node, ...], float] | None = None
        """A number that got no place on these nodes: others were faster, or the free parts of GPUs do not add up. And
        until when it is not asked for on other nodes either."""
        self._refusals: Counter[int] = Counter()
        """How often each number got no place, since as many workers or more have run."""

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """The number to start with; the fewest also where they have no room, for which Ray then waits."""
        self._maybe_send_resource_request()
        look = self._look() or Look(())
        return self._ask(self._number(look, self._others.spare), look)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """More workers if there is room, or fewer if a bundle waits for it; then all start again."""
        self._maybe_send_resource_request()
        self._group = worker_group_state.placement_group_handle.placement_group
        now, present = time.monotonic(), worker_group_state.num_workers
        self._refusals = Counter({number: times for number, times in self._refusals.items() if number > present})
        looked_at = max(worker_group_state.start_time, self._looked_at)
        if now - looked_at < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        self._looked_at, look = now, self._look()
        if look is None:
            return NoopDecision()
        more, fewer = self._number(look, self._others.spare), self._number(look)
        if more > present:
            return self._ask(more, look)
        if look.waiting and fewer < present:
            return self._ask(fewer, look)
        return NoopDecision()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Notes that a group got no place.

        A try without a place costs a minute and the steps since the last checkpoint. On a cluster of several jobs the
        nodes always differ from those of the last try. So the next try waits, each time twice as long, until as many
        workers have run. A place for fewer workers that was refused was none for more, either.
        """
        if isinstance(current_state, ReschedulingState) and self._asked is not None:
            number, nodes = self._asked
            if number > self.scaling_config.min_workers:
                self._refusals[number] += 1
                refusals = sum(times for fewer, times in self._refusals.items() if fewer <= number)
                pause_s = self.scaling_config.elastic_resize_monitor_interval_s * 2 ** min(refusals, MOST_DOUBLED)
                self._too_many = number, nodes, time.monotonic() + pause_s

    def _look(self) -> Look | None:
        """None while Ray's head does not answer. Ray Train never tries again after an error of a policy."""
        try:
            return self.look()
        except Exception:
            logger.warning("the cluster's nodes are not known now; the number of workers stays", exc_info=True)
            return None

    def look(self) -> Look:
        """The nodes as Ray and their own sockets report them.

        Raises:
            Exception: of Ray's, if its head does not answer.
        """
        labels = {node["NodeID"]: node["Labels"] for node in answering([each for each in ray.nodes() if each["Alive"]])}
        staying = labels.keys() - state.get_draining_nodes().keys()  # Ray starts nothing on a node that will be lost
        free = {node: Counter(found) for node, found in available_resources_per_node().items() if node in staying}
        for node, bundle in _bundles(self._group):
            if node in free:
                free[node].update(bundle)
        nodes = tuple(
            Node(dict(labels[node]), {kind: round(free[node][kind], 4) for kind in ("CPU", "GPU")})
            for node in sorted(free)
        )
        return Look(nodes, sum(node not in labels for node, _ in _bundles(self._others.group)))

    def _number(self, look: Look, spare: Sequence[Waiting] = ()) -> int:
        fewest = self.scaling_config.min_workers
        number = workers_with_room(
            look.nodes,
            self._worker,
            fewest=fewest,
            most=self.scaling_config.max_workers,
            multiple=self._multiple,
            first=[(look.waiting, self._others.each), *spare],
        )
        if self._too_many is not None:
            too_many, nodes, until = self._too_many
            if nodes == look.nodes or time.monotonic() < until:
                number = min(number, too_many - self._multiple)
        return max(fewest, number)

    def _ask(self, number: int, look: Look) -> ResizeDecision:
        self._asked = number, look.nodes
        logger.info("a group of %s workers, as there is room for", number)
        each = self.scaling_config._resources_per_worker_not_none
        return ResizeDecision(num_workers=number, resources_per_worker=each)

    def _get_num_workers_for_resource_request(self) -> int:
        most: int = self.scaling_config.max_workers
        return most

    def _maybe_send_resource_request(self) -> None:
        """Ask an autoscaler for nodes for the most workers. It counts nodes, whatever is used on them, so that it must
        hear of the others' bundles too."""
        super()._maybe_send_resource_request()
        if self._others.group is not None:
            if self._for_bundles is None:
                self._for_bundles = TrainAutoscalingCoordinatorClient(f"{self._requester_id}-others")
            bundles = self._others.group.bundle_specs
            each = ScalingConfig(
                resources_per_worker=bundles[0],
                use_gpu="GPU" in bundles[0],
                label_selector=self._others.each.nodes or None,
            )
            self._for_bundles.maybe_send_resource_request(each, len(bundles))

    def _cancel_resource_request(self) -> None:
        super()._cancel_resource_request()
        if self._for_bundles is not None:
            self._for_bundles.cancel_resource_request()


def answering(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of `ray.nodes()` whose raylet accepts a connection.

    For some 15 s after a loss Ray counts a node as alive. A group with a worker there would wait for a minute.
    """

    def answers(node: Mapping[str, Any]) -> bool:
        try:
            with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_LIMIT_S):
                return True
        except OSError:
            return False

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [node for node, there in zip(nodes, pool.map(answers, nodes), strict=True) if there]


def _bundles(group: Any) -> list[tuple[str, dict[str, float]]]:
    """The node of each bundle, which may have been lost, and what it holds there; none of a group that was removed."""
    table = {} if group is None else placement_group_table(group)
    if table.get("state", "REMOVED") == "REMOVED":
        return []
    return [(table["bundles_to_node_id"][number], bundle) for number, bundle in table["bundles"].items()]
