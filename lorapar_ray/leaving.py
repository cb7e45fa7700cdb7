"""Nodes of a training group that will be lost: a cloud takes a spot machine back some time after it says so.

Ray's autoscaler, or `ray drain-node`, then marks the node as draining, with a deadline. Ray Train asks for such nodes
every five seconds, tells each worker, and starts the group again at the deadline. On a Ray that a command starts for
itself nothing drains, and nobody asks (`session.ONE_MACHINE`).
"""

from __future__ import annotations

import sys


def loses_a_node() -> bool:
    """Whether this worker's group will lose one of its nodes; false outside a Ray Train worker.

    The workers of a group hear of it one after the other. `ray.train.get_preemption_info` would be the same on all, by
    a round trip through an actor for which each worker waits.
    """
    contexts = sys.modules.get("ray.train.v2._internal.execution.context")
    if contexts is None:
        return False
    try:
        return contexts.get_train_context().preemption_context.preemption_info is not None
    except RuntimeError:  # no worker
        return False
