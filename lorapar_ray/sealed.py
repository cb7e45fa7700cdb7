"""A value that may travel to other processes but never appears in a text about it.

Ray Data shows the arguments of its workers: it sends them, as text, to an actor that the dashboard reads, and exports
them to files if its export API is on.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from lorapar_ray.redact import HIDDEN

T = TypeVar("T")


class Sealed(Generic[T]):
    """Holds a value. No dataclass, mapping or sequence, since tools take those apart."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def __repr__(self) -> str:
        return HIDDEN

    def opened(self) -> T:
        """The value."""
        return self._value
