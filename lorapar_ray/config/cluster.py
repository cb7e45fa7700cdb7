"""The limits of an autoscaling cluster."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveFloat

from lorapar_ray.config.base import Section
from lorapar_ray.config.marks import Operation


class ClusterConfig(Section):
    """Limits of a cluster that grows on demand; Ray itself does not report the limits of its autoscaler."""

    max_cpus: Operation[NonNegativeInt | None] = None
    """CPUs that the cluster may grow to; None: its CPUs when a stage begins. A stage within the limit waits for
    nodes."""
    max_gpus: Operation[NonNegativeInt | None] = None
    """The same for GPUs; `gpus: auto` divides this number, also before the GPUs have joined."""
    gpu_memory_gib: Operation[PositiveFloat | None] = None
    """Memory of one GPU, for the estimate of `lorapar run --dry-run`; None: of this machine's GPUs, if it has any."""
    wait_s: Operation[PositiveFloat] = 600.0
    """On a cluster that does not grow: longest wait for free resources for stage 2's engines, so that other jobs have
    time to end, and for a lost node without which a stage cannot begin, or its replacement. With `max_cpus` or
    `max_gpus` there is no limit."""

    @property
    def grows(self) -> bool:
        """Whether nodes may join on demand."""
        return self.max_cpus is not None or self.max_gpus is not None
