"""Which config fields decide a result, and which only say how it is computed. The mark stands on the field itself.

    learning_rate: Result[PositiveFloat] = 5e-6     # another value is another result
    workers: Operation[PositiveInt] = 1             # the same result, rounding aside, from other resources

`deciding` takes the first kind out of a section: that is what `manifest.json` records of a stage, and what makes it
run again. A section or a list of sections that is a `Result` enters with its own `Result` fields only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

if TYPE_CHECKING:
    from lorapar_ray.config.base import Section


@dataclass(frozen=True)
class Mark:
    """How a field counts."""

    decides: bool
    but_not: frozenset[str] = frozenset()
    """Fields of the section, or keys of the dict, that decide nothing here although the rest does."""


RESULT = Mark(decides=True)
OPERATION = Mark(decides=False)

T = TypeVar("T")
Result = Annotated[T, RESULT]
"""The field decides the result: model, data, prompts, seeds, losses, learning rates, what a batch is made of."""
Operation = Annotated[T, OPERATION]
"""The field says how the result is computed: resources, workers, limits, retries, micro-batches, checkpoints."""


def result_but_not(*names: str) -> Mark:
    """A mark for `Annotated`: decides the result, apart from these fields or keys of it."""
    return Mark(decides=True, but_not=frozenset(names))


def mark_of(section: type[Section], field: str) -> Mark:
    """The mark of a field.

    Raises:
        TypeError: it carries none, or more than one.
    """
    found = [each for each in section.model_fields[field].metadata if isinstance(each, Mark)]
    if len(found) != 1:
        raise TypeError(f"{section.__name__}.{field}: write it as Result[...] or Operation[...]")
    return found[0]


def deciding(section: Section) -> dict[str, Any]:
    """The fields of a section, JSON-ready, that decide the result; nested sections likewise."""
    plain = section.model_dump(mode="json")
    found = {}
    for name in type(section).model_fields:
        mark = mark_of(type(section), name)
        if mark.decides:
            kept = _deciding(getattr(section, name), plain[name])
            found[name] = {k: v for k, v in kept.items() if k not in mark.but_not} if mark.but_not else kept
    return found


def _deciding(value: Any, plain: Any) -> Any:
    from lorapar_ray.config.base import Section

    if isinstance(value, Section):
        return deciding(value)
    if isinstance(value, list) and any(isinstance(each, Section) for each in value):
        return [deciding(each) for each in value]
    return plain
