"""A handle of an actor that several runs share, on behalf of one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHARED = ("start", "leave")
"""Methods that concern the whole actor."""


@dataclass(frozen=True)
class ArmHandle:
    """Like the actor's own handle; calls say which arm they concern."""

    actor: Any
    arm: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of the object itself
            raise AttributeError(name)
        method = getattr(self.actor, name)
        return method if name in SHARED else _Method(method, self.arm)


@dataclass(frozen=True)
class _Method:
    method: Any
    arm: int

    def options(self, **options: Any) -> _Method:
        return _Method(self.method.options(**options), self.arm)

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self.method.remote(*arguments, **named, arm=self.arm)
