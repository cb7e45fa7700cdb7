"""How model-written code is confined."""

from __future__ import annotations

from typing import Literal

from lorapar_ray.config.base import PositiveFloat, PositiveInt, Section
from lorapar_ray.config.marks import Operation


class SandboxConfig(Section):
    """Where programs that a model wrote run; see `lorapar_ray/sandbox/__init__.py` for what each layer keeps away."""

    layer: Operation[Literal["auto", "bubblewrap", "sandlock", "process"]] = "auto"
    """`auto`: the stronger of bubblewrap and sandlock that works here, or an error. `process`, resource limits alone,
    leaves this user's files open to the programs."""
    time_limit_s: Operation[PositiveFloat] = 10.0
    """Wall clock of one program and its tests."""
    memory_mb: Operation[PositiveInt] = 512
    """Of one program."""
    workers: Operation[PositiveInt] = 2
    """Programs at a time in each process that tests them."""
