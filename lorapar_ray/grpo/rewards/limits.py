"""The limits that a reward process sets itself before it runs anything on a model's text."""

from __future__ import annotations

import resource
from pathlib import Path

ASSUMED_MB = 4096
"""Assumed memory of a process that cannot measure it: the sandbox has no /proc."""

_in_force = False


def set_limits(memory_mb: int, programs_mb: int = 0) -> None:
    """Limit this process's address space to what it holds now plus `memory_mb`; its parent limits its time.

    Args:
        programs_mb: address space that its sandboxed programs may set themselves. They inherit this process's hard
            limit and cannot exceed it.
    """
    global _in_force
    try:
        held = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    except OSError:
        held = ASSUMED_MB * 2**20
    limit = held + memory_mb * 2**20
    hard = max(limit, programs_mb * 2**20)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:  # a limit of the machine stays
        limit, hard = min(limit, most), min(hard, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    _in_force = True


def in_force() -> bool:
    """Whether this process has limits of time and memory."""
    return _in_force
