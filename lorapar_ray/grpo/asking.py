"""Wait for the coordinator's answer over a network that may break."""

from __future__ import annotations

from typing import Any

PING_S = 20.0
"""Seconds between two pings. gRPC itself notices a dead connection only after Ray's keepalive time, five minutes."""


def answer_from(coordinator: Any, reference: Any) -> Any:
    """The result of a call to the coordinator, however long it takes.

    After a network cut, one side may have closed the connection without the other side knowing. A process that only
    waits then waits in vain. Each ping sends data, and data on a dead connection fails within seconds: the call then
    raises, and the learners restart from their checkpoint.

    Raises:
        Exception: as the call raises it.
    """
    import ray

    while not ray.wait([reference], timeout=PING_S)[0]:
        coordinator.ping.remote()
    return ray.get(reference)
