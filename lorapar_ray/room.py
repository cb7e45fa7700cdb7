"""How many workers of a range have room on a cluster's nodes, after the processes that come first: arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorapar_ray.capacity import Node, room_for
from lorapar_ray.config import Resources

Waiting = tuple[int, Resources]
"""A number of processes without a place, and what each asks for."""


@dataclass(frozen=True)
class Others:
    """Processes of the stage that get their room before the workers above the fewest."""

    group: Any = None
    """A placement group; None: there is none."""
    each: Resources = field(default_factory=Resources)
    """What each of its bundles asks for."""
    spare: tuple[Waiting, ...] = ()
    """Processes without a bundle. A group does not grow into the room in which they could start again."""


def workers_with_room(
    nodes: Sequence[Node],
    worker: Resources,
    *,
    fewest: int,
    most: int,
    multiple: int = 1,
    first: Iterable[Waiting] = (),
) -> int:
    """The number of workers to run, from `fewest` to `most`: `fewest` also where they have no room yet.

    Args:
        nodes: with what is free on each, and what the present workers hold there.
        worker: what a worker asks for.
        multiple: divides the number, as it divides `fewest` and `most`.
        first: others that get their room first. One of them gets none if that would leave too little for `fewest`
            workers: fewer workers would not help it.
    """
    if not worker.cpus and not worker.gpu_count:
        return most
    for count, process in first:
        for _ in range(count if process.cpus or process.gpu_count else 0):
            rest = _with_one_more(nodes, process, worker)
            if rest is None or room_for(worker, rest) < fewest:
                break
            nodes = rest
    room = int(min(most, room_for(worker, nodes)))
    return max(fewest, room - room % multiple)


def _with_one_more(nodes: Sequence[Node], process: Resources, worker: Resources) -> list[Node] | None:
    """What is left once a process took its part, where that costs the fewest workers; None: no node holds it."""
    left = {at: node.without(process) for at, node in enumerate(nodes) if room_for(process, [node]) >= 1}
    if not left:
        return None
    best = min(left, key=lambda at: room_for(worker, [nodes[at]]) - room_for(worker, [left[at]]))
    return [*nodes[:best], left[best], *nodes[best + 1 :]]
