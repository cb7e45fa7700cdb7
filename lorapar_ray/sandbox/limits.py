"""What one program may use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one job. Each is enforced by the kernel or by the process outside, never by the code that is tested."""

    seconds: float = 10.0
    """Wall clock, from the moment the program may start. Sleeping counts."""
    memory_mb: int = 512
    """Address space of one process; where cgroups are writable, also the memory of the whole job."""
    scratch_mb: int = 16
    """Size of /tmp. Only bubblewrap gives a writable folder: the other layers cannot limit its size, so have none."""
    output_kb: int = 1024
    """Standard output and error together; more ends the job."""
    tasks: int = 32
    """Threads and processes together. The kernel counts them for users other than root, and in a cgroup."""
    processes: bool = False
    """Whether the program may start processes. Only bubblewrap, whose PID namespace ends them all, allows it."""
