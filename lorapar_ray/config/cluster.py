"""What the cluster may become."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveFloat

from lorapar_ray.config.base import Section
from lorapar_ray.config.marks import Operation


class ClusterConfig(Section):
    """A cluster that grows on demand; Ray itself does not say how far its autoscaler may go."""

    max_cpus: Operation[NonNegativeInt | None] = None
    """CPUs that it may grow to; None: those that it has when a stage begins. A stage that fits waits for the nodes."""
    max_gpus: Operation[NonNegativeInt | None] = None
    """The same for GPUs; `gpus: auto` shares out so many, also while there is none yet."""
    gpu_memory_gib: Operation[PositiveFloat | None] = None
    """Of one GPU, for the estimate of `lorapar run --dry-run`; None: that of this machine's GPUs, if it has any."""
    wait_s: Operation[PositiveFloat] = 600.0
    """For room for stage 2's engines: as long as a node takes to start, or other jobs to end. A stage that needs a node
    which the cluster has lost waits as long for it, or another, to be there."""
