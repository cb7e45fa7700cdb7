"""The GPUs that a plan is made for; imports nothing heavy."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from lorapar_ray.config import Config
from lorapar_ray.versions import uses_gpus

GIB = float(2**30)


@dataclass(frozen=True)
class Device:
    """The cluster's GPUs, all alike."""

    count: int
    bytes: float | None
    """Memory of each; None: unknown."""


def device_of(config: Config) -> Device:
    """The cluster's GPUs from the config, else those of this machine that a run here would use."""
    cluster, here = config.cluster, usable_gpus()
    memory = None if cluster.gpu_memory_gib is None else cluster.gpu_memory_gib * GIB
    known = [each for each in here if each is not None]
    if memory is None and known:
        memory = min(known)
    return Device(len(here) if cluster.max_gpus is None else cluster.max_gpus, memory)


def usable_gpus() -> list[float | None]:
    """Bytes of each GPU that the installed packages can use and CUDA_VISIBLE_DEVICES shows; None: unknown."""
    return visible(installed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")) if uses_gpus() else []


def installed_gpus() -> dict[str, float | None]:
    """Bytes of each of this machine's GPUs by its UUID, in the driver's order; None: unknown. Asks the driver's tool,
    since torch would initialise CUDA."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = [[field.strip() for field in line.split(",")] for line in told.splitlines()]
    gpus = (line for line in lines if len(line) == 2 and line[0].startswith("GPU-"))
    return {uuid: float(size) * 2**20 if size.isdecimal() else None for uuid, size in gpus}


def visible(gpus: dict[str, float | None], variable: str | None) -> list[float | None]:
    """Bytes of each GPU that a value of CUDA_VISIBLE_DEVICES shows, as CUDA reads it: indices or the beginnings of
    UUIDs, up to the first that names none. A part of a GPU (MIG) counts as one, of unknown size.

    Args:
        gpus: bytes by UUID.
        variable: None: not set, so all are visible.
    """
    if variable is None:
        return list(gpus.values())
    shown: list[float | None] = []
    for name in (each.strip() for each in variable.split(",")):
        if name.startswith("MIG-") and gpus:
            shown.append(None)
            continue
        found = [size for index, (uuid, size) in enumerate(gpus.items()) if name and _names(name, index, uuid)]
        if len(found) != 1:
            break
        shown += found
    return shown


def _names(name: str, index: int, uuid: str) -> bool:
    return int(name) == index if name.isdecimal() else uuid.startswith(name)
