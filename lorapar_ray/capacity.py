"""The cluster's resources, its limits of growth, and whether a stage's processes can ever fit.

An autoscaling cluster may have zero nodes: its limits count as capacity, and a stage that needs more than the current
resources waits, like Ray itself. A cluster that has lost nodes gets time to replace them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from lorapar_ray.config import ClusterConfig, Resources
from lorapar_ray.errors import UserError
from lorapar_ray.progress import console
from lorapar_ray.threads import meanwhile

LOOK_AGAIN_S = 2.0
"""Seconds between two checks for a lost node."""
LOOK_WHILE_WORKING_S = 10.0
"""The same while a stage works."""

_growth: ContextVar[ClusterConfig | None] = ContextVar("growth", default=None)


@dataclass(frozen=True)
class Node:
    """An existing node, with all that it has, or with what is free on it."""

    labels: dict[str, str]
    amounts: dict[str, float]
    """By Ray's name of the resource."""

    def holds(self, resources: Resources) -> float:
        """How many such processes fit into these amounts; a fraction of a GPU is on one GPU."""
        cpus, gpus, each = self.amounts.get("CPU", 0.0), self.amounts.get("GPU", 0.0), resources.gpu_count
        by_cpu = math.floor(cpus / resources.cpus + 1e-9) if resources.cpus else math.inf
        if not each:
            return by_cpu
        whole = math.floor(gpus / each + 1e-9) if each >= 1 else math.floor(gpus + 1e-9) * math.floor(1 / each + 1e-9)
        return min(by_cpu, whole)

    def accepts(self, resources: Resources) -> bool:
        """Whether the node has the labels that such a process asks for."""
        return all(_selects(value, self.labels.get(key)) for key, value in resources.nodes.items())

    def without(self, resources: Resources) -> Node:
        """The node after such a process took its part."""
        taken = {"CPU": resources.cpus, "GPU": resources.gpu_count}
        return replace(self, amounts={kind: amount - taken.get(kind, 0.0) for kind, amount in self.amounts.items()})


@dataclass(frozen=True)
class Capacity:
    """Amounts by Ray's name of the resource (CPU, GPU)."""

    now: dict[str, float]
    most: dict[str, float] = field(default_factory=dict)
    """Limits of an autoscaling cluster."""
    nodes: tuple[Node, ...] = ()
    lost: int = 0
    """Lost nodes; they, or replacements, may join again."""

    def largest(self, kind: str) -> float:
        """The current amount, or the limit, of a resource."""
        return max(self.now.get(kind, 0.0), self.most.get(kind, 0.0))


@contextmanager
def growing(to: ClusterConfig) -> Iterator[None]:
    """Let `capacity` include the cluster's limits inside this block."""
    token = _growth.set(to)
    try:
        yield
    finally:
        _growth.reset(token)


def capacity() -> Capacity:
    """Capacity of the cluster that this process is connected to."""
    import ray

    growth = _growth.get() or ClusterConfig()
    may = {"CPU": growth.max_cpus, "GPU": growth.max_gpus}
    most = {kind: float(amount) for kind, amount in may.items() if amount is not None}
    known = ray.nodes()
    alive = [Node(dict(node["Labels"]), dict(node["Resources"])) for node in known if node["Alive"]]
    return Capacity(ray.cluster_resources(), most, tuple(alive), len(known) - len(alive))


def require(stage: str, groups: dict[str, tuple[int, Resources]], hint: str = "") -> None:
    """Fail at once, instead of waiting forever, if the cluster can never provide what `stage` requests.

    Prints a line if the cluster must grow first. If nodes were lost, waits for `cluster.wait_s` before it fails.

    Args:
        groups: by name, the number of processes and the resources of each; all run at the same time.
        hint: the setting to lower; default: the first of `groups`.

    Raises:
        UserError: names the resource or the label, what is wanted and what the cluster has.
    """
    limit_s = (_growth.get() or ClusterConfig()).wait_s
    require_soon(stage, capacity, groups, hint or _first_setting(stage, groups), limit_s)


def require_soon(
    stage: str, look: Callable[[], Capacity], groups: dict[str, tuple[int, Resources]], hint: str, limit_s: float
) -> None:
    """See `require`; on a cluster that `look` shows as it is now."""
    deadline, said = time.monotonic() + limit_s, False
    while True:
        has = look()
        try:
            return require_fit(stage, has, groups, hint)
        except UserError as error:
            if has.most or not has.lost or time.monotonic() > deadline:
                raise
            if not said:
                console.print(f"  {stage} waits up to {limit_s:g} s for a node that was lost: {error}")
            said = True
            time.sleep(LOOK_AGAIN_S)


@contextmanager
def needing(stage: str, groups: dict[str, tuple[int, Resources]], hint: str = "") -> Iterator[None]:
    """`require`, then, while the block runs, print a line if the cluster has lost nodes that `stage` needs: Ray itself
    waits silently until others join.

    Raises:
        UserError: as `require`.
    """
    require(stage, groups, hint)
    told = missing_for(stage, capacity(), groups, hint)  # `require` has reported it

    def look() -> None:
        nonlocal told
        with suppress(Exception):  # the connection may be ending
            missing = missing_for(stage, capacity(), groups, hint)
            if missing and not told:
                console.print(f"  {stage} waits for nodes: {missing}")
            told = missing

    with meanwhile(look, every_s=LOOK_WHILE_WORKING_S):
        yield


def missing_for(stage: str, has: Capacity, groups: dict[str, tuple[int, Resources]], hint: str = "") -> str:
    """Why the processes have no room on the present nodes; empty: they have room."""
    try:
        require_fit(stage, replace(has, most={}), groups, hint or _first_setting(stage, groups))
    except UserError as error:
        return str(error).removeprefix(f"{stage}: ")
    return ""


def _first_setting(stage: str, groups: dict[str, tuple[int, Resources]]) -> str:
    return f"{stage}.{next(iter(groups))}"


def require_fit(stage: str, has: Capacity, groups: dict[str, tuple[int, Resources]], hint: str) -> None:
    """See `require`; on a known cluster."""
    said = False
    for kind, each in (("CPU", "cpus"), ("GPU", "gpu_count")):
        wanted = {name: (count, float(getattr(resources, each))) for name, (count, resources) in groups.items()}
        amount = sum(count * size for count, size in wanted.values())
        parts = ", ".join(f"{name} {count} × {size:g}" for name, (count, size) in wanted.items() if size)
        now, largest = has.now.get(kind, 0.0), has.largest(kind)
        if amount > largest + 1e-9:
            grown = f"{now:g} and may grow to {largest:g}" if has.most else f"{now:g}"
            raise UserError(
                f"{stage}: asks for {amount:g} {kind} ({parts}) but the cluster has {grown}; "
                f"lower {hint} or the resources, or add nodes (cluster.max_{kind.lower()}s if it grows on demand)"
            )
        if amount > now + 1e-9:
            said = True
            console.print(f"  {stage} waits for nodes: {amount:g} {kind} ({parts}), the cluster has {now:g} so far")
    for name, (count, resources) in groups.items() if has.nodes else ():
        if missing := _missing(resources.nodes, has.nodes):
            fault = f"{name} asks for nodes with the label {missing}, which no node of this cluster has"
            fix = "correct the `nodes` of its resources, or start nodes with `ray start --labels`"
        elif count > (room := room_for(resources, has.nodes)) and not said:
            labels = ", ".join(f"{key}={value}" for key, value in resources.nodes.items())
            gpus = f" and {resources.gpu_count:g} GPU" if resources.gpu_count else ""
            fault = (
                f"asks for {name} {count} × {resources.cpus:g} CPU{gpus}, each on a single node"
                f"{f' with {labels}' if labels else ''}, but the nodes have room for {room:g}"
            )
            fix = f"lower {hint} or the resources, or add nodes (cluster.max_cpus if it grows on demand)"
        else:
            continue
        if not has.most:
            raise UserError(f"{stage}: {fault}; {fix}")
        console.print(f"  {stage} waits for nodes: {fault} so far")  # what may still join is unknown


def room_for(resources: Resources, nodes: Iterable[Node]) -> float:
    """How many such processes fit on these nodes; `inf` if they ask for nothing."""
    return sum(node.holds(resources) for node in nodes if node.accepts(resources))


def _missing(asked: dict[str, str], nodes: tuple[Node, ...]) -> str:
    """The label that no node has, as `key=value`."""
    for key, value in asked.items():
        if not any(_selects(value, node.labels.get(key)) for node in nodes):
            return f"{key}={value}"
    return ""


def _selects(selector: str, label: str | None) -> bool:
    """Whether Ray's label selector (`a`, `!a`, `in(a, b)`, `!in(a, b)`) accepts a node with this label, or without
    it."""
    wanted = selector.removeprefix("!")
    if wanted.startswith("in(") and wanted.endswith(")"):
        found = label in [each.strip() for each in wanted[3:-1].split(",")]
    else:
        found = label == wanted
    return found != selector.startswith("!")
