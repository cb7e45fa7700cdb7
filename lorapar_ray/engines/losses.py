"""Detects that an engine is lost, and ends one that hangs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from lorapar_ray.engines.arm_handle import ArmHandle
from lorapar_ray.waiting import awaited

LEAVE_LIMIT_S = 10.0
"""Time for a hanging engine's actor to end its children before it is killed."""


async def leave(engine: Any) -> None:
    """Ask an engine's actor to end its children and itself; kill it if it does not, or has not begun."""
    import ray

    actor = engine.actor if isinstance(engine, ArmHandle) else engine
    with contextlib.suppress(Exception):
        async with asyncio.timeout(LEAVE_LIMIT_S):
            if not await asyncio.to_thread(_waits_for_a_place, actor):
                await awaited(engine.leave.remote())
    ray.kill(actor)


def _waits_for_a_place(actor: Any) -> bool:
    """Whether Ray has not created the actor yet, which then answers nothing."""
    from ray._private.state import actors

    return actors(actor._actor_id.hex()).get("State") in ("DEPENDENCIES_UNREADY", "PENDING_CREATION")


def is_lost(error: Exception) -> bool:
    """Whether an engine, or its answer, is lost (and not only a request refused)."""
    import ray

    gone = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError)
    return isinstance(error, (TimeoutError, *gone))


def fetch_failed(error: Exception) -> bool:
    """Whether an engine could not fetch an object."""
    import ray

    return isinstance(error, ray.exceptions.ObjectLostError | ray.exceptions.RayDirectTransportError)


def is_dead(error: Exception) -> bool:
    """Whether Ray knows that the actor has ended; else it may only be unreachable."""
    import ray

    return isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.OutOfMemoryError)
