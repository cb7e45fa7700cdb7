"""Resource limits of one program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one job. The kernel or the outside process enforces each, never the tested code."""

    seconds: float = 10.0
    """Wall-clock time from the program's start; sleeping counts."""
    memory_mb: int = 512
    """Address space of one process; with writable cgroups also the memory of the whole job."""
    scratch_mb: int = 16
    """Size of /tmp. Only bubblewrap has a writable folder: the other layers cannot limit its size."""
    output_kb: int = 1024
    """Standard output and error together; more ends the job."""
    tasks: int = 32
    """Threads and processes together. The kernel enforces it for users other than root, and in a cgroup."""
    processes: bool = False
    """Whether the program may start processes. Only bubblewrap allows it: its PID namespace ends them all."""
