"""Rollout engines that several runs share: each serves one policy of every run, and their groups fill its batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorapar_ray.engines.arm_handle import ArmHandle


class SharedEngines:
    """One engine for each place; used in one event loop by the pools of all runs.

    Each pool starts, verifies and replaces its engines as if it were alone. A pool that asks again for a place has lost
    its engine there, so a new one starts; the other pools get the new one when they have lost the old one too.
    """

    def __init__(self, start: Callable[[int], Any]) -> None:
        """`start` creates the engine of a place and returns its handle."""
        self._start = start
        self._engines: dict[int, Any] = {}
        self._users: dict[int, set[int]] = {}
        """By place, the arms that have its engine."""

    def engine(self, arm: int, slot: int) -> ArmHandle:
        """An arm's handle of the engine in `slot`, which is started if needed."""
        if arm in self._users.setdefault(slot, set()) or slot not in self._engines:
            self._engines[slot] = self._start(slot)
            self._users[slot].clear()
        self._users[slot].add(arm)
        return ArmHandle(self._engines[slot], arm)
