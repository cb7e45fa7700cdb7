"""The environment that the config names."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from lorapar_ray.boundary import imported
from lorapar_ray.errors import UserError
from lorapar_ray.interrupts import handlers_kept

if TYPE_CHECKING:
    from lorapar_ray.config import GrpoConfig
    from lorapar_ray.grpo.environments.episodes import RolloutFunction


def get_environment(name: str) -> RolloutFunction:
    """The function `module:function`.

    Raises:
        UserError: it cannot be imported, or is not an async function of an engine and a row.
    """
    where = f"grpo.environment: '{name}'"
    if ":" not in name:
        raise UserError(f"{where} is not module:function")
    with handlers_kept():
        found: RolloutFunction = imported(name, where)
    called = found if inspect.isroutine(found) else getattr(found, "__call__", None)  # noqa: B004
    if not inspect.iscoroutinefunction(called):
        raise UserError(f"{where} is not an async function; write `async def rollout(engine, row)`")
    try:
        inspect.signature(found).bind(None, None)
    except TypeError as error:
        raise UserError(f"{where} cannot be called with an engine and a row: {error}") from error
    return found


def require_environment(settings: GrpoConfig) -> None:
    """Check that the environment, if there is one, can be imported.

    Raises:
        UserError: see `get_environment`.
    """
    if settings.environment is not None:
        get_environment(settings.environment)
