"""The GPUs that a plan is made for; imports nothing heavy."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from lorapar_ray.config import Config

GIB = float(2**30)


@dataclass(frozen=True)
class Device:
    """The cluster's GPUs, all alike."""

    count: int
    bytes: float | None
    """Memory of each; None: unknown."""


def device_of(config: Config) -> Device:
    """The cluster's GPUs from the config, else the GPUs of this machine."""
    cluster, here = config.cluster, _gpus_here()
    memory = None if cluster.gpu_memory_gib is None else cluster.gpu_memory_gib * GIB
    if memory is None and here:
        memory = min(here)
    return Device(len(here) if cluster.max_gpus is None else cluster.max_gpus, memory)


def _gpus_here() -> list[float]:
    """Bytes of each GPU; asks the driver's tool, since torch would initialise CUDA."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [float(line) * 2**20 for line in told.split("\n") if line.strip().isdecimal()]
