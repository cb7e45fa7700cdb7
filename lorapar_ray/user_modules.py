"""The user's own Python modules, such as rewards: their files, found without importing anything."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

MODULE = "module "
"""Begins the name of a module among what a stage reads. The name has no path: a job's working directory lies in another
folder after each change of its files."""
INSTALLED = ("site-packages", "dist-packages")


def user_modules(*functions: str | None) -> Iterator[str]:
    """The modules of `module:function` names as something that a stage reads; nothing for other names, for this
    project's own modules and for those of the standard library or an installed package, which go by their names."""
    for name in functions:
        module, colon, _ = (name or "").partition(":")
        if colon and module.partition(".")[0] != __name__.partition(".")[0]:
            yield f"{MODULE}{module}"


def module_file(name: str) -> Path | None:
    """The file of a module outside of installed packages; None if there is none. Parent packages are not imported."""
    try:
        top, *parts = name.split(".")
        spec = find_spec(top)
        for part in parts:
            spec = _inside(spec, part)
    except (ImportError, ValueError, AttributeError):  # no name of a module, or one that was loaded by other means
        return None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    file = Path(spec.origin)
    return None if set(INSTALLED) & set(file.parts) else file


def _inside(package: ModuleSpec | None, part: str) -> ModuleSpec | None:
    if package is None or package.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(f"{package.name}.{part}", list(package.submodule_search_locations))
