"""What the cluster has, what it may grow to, and whether a stage's processes can ever fit it.

An autoscaling cluster may stand at zero nodes: what it may grow to counts as room, and a stage that needs more than
there is now waits for it, as Ray itself does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from lorapar_ray.config import ClusterConfig, Resources
from lorapar_ray.errors import UserError
from lorapar_ray.progress import console

_growth: ContextVar[ClusterConfig | None] = ContextVar("growth", default=None)


@dataclass(frozen=True)
class Capacity:
    """Amounts by Ray's name of the resource (CPU, GPU)."""

    now: dict[str, float]
    most: dict[str, float] = field(default_factory=dict)
    """What an autoscaling cluster may grow to."""
    labels: tuple[dict[str, str], ...] = ()
    """Of each node that there is."""

    def largest(self, kind: str) -> float:
        """What there is, or may come to be, of a resource."""
        return max(self.now.get(kind, 0.0), self.most.get(kind, 0.0))


@contextmanager
def growing(to: ClusterConfig) -> Iterator[None]:
    """Let `capacity` count what the cluster may grow to while the block runs."""
    token = _growth.set(to)
    try:
        yield
    finally:
        _growth.reset(token)


def capacity() -> Capacity:
    """Of the cluster that this process is connected to."""
    import ray

    growth = _growth.get() or ClusterConfig()
    may = {"CPU": growth.max_cpus, "GPU": growth.max_gpus}
    most = {kind: float(amount) for kind, amount in may.items() if amount is not None}
    return Capacity(ray.cluster_resources(), most, tuple(dict(node["Labels"]) for node in ray.nodes() if node["Alive"]))


def require(stage: str, groups: dict[str, tuple[int, Resources]], hint: str = "") -> None:
    """Fail at once, instead of waiting without end, when the cluster can never hold what `stage` asks for.

    Says so where it can, but has to grow first.

    Args:
        groups: by what they are, how many processes there are and what each asks for; all run at the same time.
        hint: the setting to lower; default: the first of `groups`.

    Raises:
        UserError: names the resource or the label, what is wanted and what the cluster has.
    """
    require_fit(stage, capacity(), groups, hint or f"{stage}.{next(iter(groups))}")


def require_fit(stage: str, has: Capacity, groups: dict[str, tuple[int, Resources]], hint: str) -> None:
    """See `require`; on a known cluster."""
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
            console.print(f"  {stage} waits for nodes: {amount:g} {kind} ({parts}), the cluster has {now:g} so far")
    for name, (_, resources) in groups.items():
        if missing := _missing(resources.nodes, has.labels) if not has.most else "":
            raise UserError(
                f"{stage}: {name} asks for nodes with the label {missing}, which no node of this cluster has; correct "
                "the `nodes` of its resources, or start nodes with `ray start --labels`"
            )


def _missing(asked: dict[str, str], nodes: tuple[dict[str, str], ...]) -> str:
    """The label that no node has, as `key=value`."""
    for key, value in asked.items():
        if not any(_selects(value, labels.get(key)) for labels in nodes):
            return f"{key}={value}"
    return ""


def _selects(selector: str, label: str | None) -> bool:
    """Whether Ray's label selector (`a`, `!a`, `in(a, b)`, `!in(a, b)`) takes a node with this label, or without it."""
    wanted = selector.removeprefix("!")
    if wanted.startswith("in(") and wanted.endswith(")"):
        found = label in [each.strip() for each in wanted[3:-1].split(",")]
    else:
        found = label == wanted
    return found != selector.startswith("!")
