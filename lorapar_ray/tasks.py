"""Short work on some machine of the cluster, such as looking at a model's files, which the driver may not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorapar_ray.config import Resources
from lorapar_ray.errors import UserError
from lorapar_ray.workers import ray_options, worker_environment


def on_a_worker(function: Callable[..., Any], *arguments: Any, resources: Resources | None = None) -> Any:
    """Run `function(*arguments)` as a Ray task and wait for what it returns.

    Args:
        function: importable by name on the workers.
        resources: None: no core of its own, and no GPU.

    Raises:
        UserError: as the task raised it.
    """
    import ray

    asked = Resources(cpus=0) if resources is None else resources
    task = ray.remote(_work).options(**ray_options(asked), runtime_env={"env_vars": worker_environment(asked)})
    result, problem = ray.get(task.remote(function, arguments))
    if problem is not None:
        raise UserError(problem)
    return result


def _work(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None]:
    """(result, None), or (None, message of a user's error): as an error it would carry the worker's traceback."""
    try:
        return function(*arguments), None
    except UserError as error:
        return None, str(error)
