"""Numbers of processes that may be ranges: `workers: [1, 8]`, the fewest and the most.

A section keeps a range in two fields, `workers` (the fewest) and `max_workers` (the most; None: a fixed number). A file
may also set these two: resolved configs do.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, TypeAdapter, ValidationError, WithJsonSchema, model_validator

from lorapar_ray.config.base import LARGEST, PositiveInt, Section

_PAIR: TypeAdapter[tuple[int, int]] = TypeAdapter(tuple[PositiveInt, PositiveInt])
_COUNT = {"type": "integer", "minimum": 1, "maximum": LARGEST}
_LIST = {"type": "array", "items": _COUNT, "minItems": 2, "maxItems": 2}


def _one_number(value: Any) -> Any:
    if isinstance(value, list | tuple):  # a right one was split before
        raise ValueError("a range is [fewest, most]: two whole numbers, 1 or more, the smaller one first")
    return value


_SCHEMA = WithJsonSchema({"anyOf": [_COUNT, _LIST]}, mode="validation")
NumberOrRange = Annotated[PositiveInt, BeforeValidator(_one_number), _SCHEMA]
"""A number of processes, or a list of two: `[fewest, most]`. A checked section holds the fewest here, and the most in
the field `max_…`."""


class Ranged(Section):
    """A section in which each field `NAME` that has a field `max_NAME` beside it may be a range."""

    @model_validator(mode="before")
    @classmethod
    def _split_ranges(cls, tree: Any) -> Any:
        for name in _names(cls) if isinstance(tree, dict) else ():
            found, older = _range_in(tree.get(name)), tree.get(f"max_{name}")
            if found is None:
                continue
            fewest, most = found
            if older is not None and older != most:
                raise ValueError(
                    f"max_{name}: {older!r} contradicts {name}: [{fewest}, {most}], which has the most already; "
                    f"remove max_{name}, or set it to null"
                )
            tree = {**tree, name: fewest, f"max_{name}": most}
        return tree

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> Self:
        for name in _names(type(self)):
            fewest, most = getattr(self, name), getattr(self, f"max_{name}")
            if most is not None and most < fewest:
                raise ValueError(f"max_{name}: {most} is below {name} ({fewest})")
        return self


def require_no_range_by_node(name: str, most: int | None, sharding: str) -> None:
    """Check the range of a training group's workers.

    Args:
        name: of the field with the fewest.
        most: of the field `max_<name>`.

    Raises:
        ValueError: the base is cut by node, which needs as many workers on each node.
    """
    if most is not None and sharding == "hsdp":
        raise ValueError(
            f"{name}: hsdp needs as many {name} on each node; set sharding: fsdp2, or one number of {name}, not a range"
        )


def _names(section: type[Section]) -> list[str]:
    """The fields that may be ranges."""
    return [name for name in section.model_fields if f"max_{name}" in section.model_fields]


def _range_in(value: Any) -> tuple[int, int] | None:
    """(fewest, most) of a list that is a range."""
    if not isinstance(value, list | tuple):
        return None
    try:
        fewest, most = _PAIR.validate_python(tuple(value))
    except ValidationError:
        return None
    return (fewest, most) if fewest <= most else None
