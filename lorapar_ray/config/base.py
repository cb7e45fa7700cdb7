"""The base of every config section: immutable, no unknown fields, finite numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1
"""Largest count: the libraries store counts in 32 bits."""

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
Optional0 = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seeds that Python, NumPy and torch all accept."""
System = Annotated[int, Field(ge=1, le=9)]
"""The number of a System; its meaning is in `label.definitions`."""
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)]
"""A plain word that may also be a file name: no slash, no leading dot."""
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
"""`auto`: bfloat16 if the device supports it, else float32 (see `lorapar_ray.precision`)."""
AdamBeta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[AdamBeta, AdamBeta]
Tracker = Literal["tensorboard", "wandb", "mlflow"]

Item = TypeVar("Item")


def _once_each(items: list[Item]) -> list[Item]:
    for item in items:
        if items.count(item) > 1:
            raise ValueError(f"{item!r} is given twice")
    return items


Distinct = Annotated[list[Item], AfterValidator(_once_each)]
"""A list without duplicates."""
StopStrings = Distinct[Annotated[str, Field(min_length=1)]]


class Section(BaseModel):
    """A part of the config: immutable; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def names_in(text: str, field: str) -> set[str]:
    """The `{names}` in a template.

    Raises:
        ValueError: a brace without its partner.
    """
    try:
        return {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ValueError(f"{field}: {error}; write a plain brace twice") from error


def require_last_words(choice: str) -> None:
    """Check the end of a prompt that asks for a number.

    Raises:
        ValueError: it is empty or ends in white space.
    """
    if not choice.strip() or choice != choice.rstrip():
        raise ValueError("choice: must end in a word, since a space and the number follow")


def unusable(value: Any, where: tuple[str, ...] = ()) -> tuple[Sequence[str], str] | None:
    """The first nested value that cannot be stored in a file: (its path, the reason), or None."""
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return where, f"must be a finite number, got {value}"
    if isinstance(value, str) and not _plain(value):
        return where, f"contains a character that is not text (NUL or half a surrogate pair): {value[:40]!r}"
    if isinstance(value, dict):
        for key, below in value.items():
            if found := unusable(key, (*where, repr(key))) or unusable(below, (*where, str(key))):
                return found
    if isinstance(value, list | tuple):
        for index, below in enumerate(value):
            if found := unusable(below, (*where, str(index))):
                return found
    return None


def _plain(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)
