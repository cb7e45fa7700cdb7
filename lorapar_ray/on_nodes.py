"""Asks nodes of the cluster something, each in a process there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorapar_ray.text import REASON_LENGTH, final_line

SILENT = "no answer"
"""The reason of a node that is still at it."""


def on_nodes(
    task: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]], limit_s: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `task` returns on each node, and the reason of each node that sent nothing.

    Args:
        task: importable by name there; it asks for no core.
        arguments: by node id, those of its call.
        limit_s: for a node to start a process and answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def there(node: str) -> Any:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(task).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)

    asked = {there(node).remote(*own): node for node, own in arguments.items()}
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=limit_s) if asked else ([], [])
    found, failed = {}, dict.fromkeys((asked[call] for call in late), SILENT)
    for call in answered:
        try:
            found[asked[call]] = ray.get(call)
        except ray.exceptions.RayError as error:  # ends with the line of the error on the node
            failed[asked[call]] = final_line(error, REASON_LENGTH) or type(error).__name__
    return found, failed
