"""Marks of config fields: which ones change a result, and which only change how it is computed.

    learning_rate: Result[PositiveFloat] = 5e-6     # another value is another result
    workers: Operation[PositiveInt] = 1             # the same result, rounding aside, from other resources

`deciding` selects the `Result` fields of a section: `manifest.json` records them for each stage, and a change makes the
stage run again. Of a nested section or list of sections it selects only the `Result` fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, get_args

if TYPE_CHECKING:
    from lorapar_ray.config.base import Section


@dataclass(frozen=True)
class Mark:
    """Whether a field changes a result."""

    decides: bool
    but_not: frozenset[str] = frozenset()
    """Exceptions: fields of the section, or keys of the dict, that do not change a result."""
    still: frozenset[tuple[str, str]] = frozenset()
    """Exceptions from these: a key of the dict, and its one value that does change it."""

    def counts(self, key: str, value: Any) -> bool:
        """Whether an item of the field's dict changes a result."""
        return key not in self.but_not or (key, str(value)) in self.still


RESULT = Mark(decides=True)
OPERATION = Mark(decides=False)

T = TypeVar("T")
Result = Annotated[T, RESULT]
"""The field changes the result: model, data, prompts, seeds, losses, learning rates, the contents of a batch."""
Operation = Annotated[T, OPERATION]
"""The field only changes how the result is computed: resources, workers, limits, retries, micro-batches,
checkpoints."""


def result_but_not(*names: str, still: tuple[tuple[str, str], ...] = ()) -> Mark:
    """A mark for `Annotated`: changes the result, except for these fields or keys.

    Args:
        still: of these keys, (key, value) that changes it all the same.
    """
    return Mark(decides=True, but_not=frozenset(names), still=frozenset(still))


@cache
def mark_of(section: type[Section], field: str) -> Mark:
    """The mark of a field.

    Raises:
        TypeError: it has no mark, or more than one.
    """
    found = [each for each in section.model_fields[field].metadata if isinstance(each, Mark)]
    if len(found) != 1:
        raise TypeError(f"{section.__name__}.{field}: write it as Result[...] or Operation[...]")
    return found[0]


class Setting(NamedTuple):
    """A value that changes a result."""

    value: Any
    """JSON-ready."""
    is_default: bool


def deciding(section: Section, name: str = "") -> dict[str, Setting]:
    """The settings of a section that change the result, by path: `grpo.rewards.0.weight` for `name` "grpo".

    Sections and lists of sections are expanded into their fields; any other value, also a dict, is one setting.
    """
    return dict(_settings(section, section.model_dump(mode="json"), name, frozenset()))


def known_setting(root: type[Section], path: str) -> bool:
    """Whether a path from `deciding`, perhaps of an older version, names a field of the current config (its first part
    is a field of `root`)."""
    sections: set[type[Section]] = {root}
    for part in path.split("."):
        if part.isdecimal():
            continue
        fields = [each.model_fields[part].annotation for each in sections if part in each.model_fields]
        if not fields:
            return False
        sections = set().union(*map(_sections_in, fields))
    return True


def _settings(section: Section, plain: dict[str, Any], name: str, but_not: frozenset[str]) -> Iterator[Any]:
    for field, info in type(section).model_fields.items():
        mark, path = mark_of(type(section), field), f"{name}.{field}" if name else field
        if field in but_not or not mark.decides:
            continue
        value = getattr(section, field)
        parts = _parts(value, path, plain[field])
        for part, path_of_it, plain_part in parts:
            yield from _settings(part, plain_part, path_of_it, mark.but_not)
        if not parts:
            kept = plain[field]
            if isinstance(kept, dict):
                kept = {str(key): each for key, each in kept.items() if mark.counts(key, each)}
            yield path, Setting(kept, not info.is_required() and value == info.default)


def _parts(value: Any, path: str, plain: Any) -> list[tuple[Section, str, Any]]:
    """The sections in a field's value, with their paths and JSON; none: it is one setting."""
    if isinstance(value, _section()):
        return [(value, path, plain)]
    if isinstance(value, list) and any(isinstance(each, _section()) for each in value):
        return [(each, f"{path}.{index}", plain[index]) for index, each in enumerate(value)]
    return []


@cache
def _section() -> type[Section]:
    from lorapar_ray.config.base import Section

    return Section


def _sections_in(annotation: Any) -> set[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, _section()):
        return {annotation}
    return set().union(*map(_sections_in, get_args(annotation)))
