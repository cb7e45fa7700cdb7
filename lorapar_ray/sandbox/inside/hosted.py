"""Runs the user's Python module, such as a reward process, and confines the process first."""

from __future__ import annotations

import runpy
import sys

from .confinement import confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main(settings: dict[str, Any]) -> None:
    """Run `python -m MODULE ARGUMENT...` with the given import path, confined."""
    sys.path[:] = settings["path"]
    sys.argv[1:] = settings["arguments"]
    confine(settings)
    runpy.run_module(settings["module"], run_name="__main__", alter_sys=True)
