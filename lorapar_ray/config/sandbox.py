"""Limits of model-written code."""

from __future__ import annotations

from typing import Literal

from lorapar_ray.config.base import PositiveFloat, PositiveInt, Section
from lorapar_ray.config.marks import Operation


class SandboxConfig(Section):
    """Where programs that a model wrote run; `lorapar_ray/sandbox/__init__.py` describes the protection of each
    layer."""

    layer: Operation[Literal["auto", "bubblewrap", "sandlock", "process"]] = "auto"
    """`auto`: bubblewrap or sandlock, the stronger one that works on the machine, else an error. `process`: resource
    limits only; programs can read this user's files."""
    time_limit_s: Operation[PositiveFloat] = 10.0
    """Wall-clock limit of one program and its tests."""
    memory_mb: Operation[PositiveInt] = 512
    """Memory limit of one program."""
    workers: Operation[PositiveInt] = 2
    """Programs that each testing process runs at a time."""
