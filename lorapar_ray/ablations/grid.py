"""A grid of arms, and what it claims about them."""

from __future__ import annotations

from dataclasses import dataclass

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates of a sweep, relative to the config's."""
VALIDATION = 0.1
"""Share of the training rows that a sweep holds out for its loss."""


@dataclass(frozen=True)
class Arm:
    """One arm: the config with a few settings changed."""

    name: str
    changes: tuple[str, ...] = ()
    """As for `--set`."""
    paper: str = ""
    """The paper's figure, in % on GSM8K."""
    as_large_as: Arm | None = None
    """Its rank is the one with as many elements as stage 1 of this other arm trains, with the same scaling alpha /
    rank."""
    teachers: int | None = None
    """At most so many of the config's teachers, the first ones; None: all."""
    after: int = 0
    """Leaves out so many before these, and those that use their engines."""
    needs: int = 0
    """Only if the config has so many teachers."""
    votes: bool = False
    """Only if teachers vote."""
    second_rate: float = 1.0
    """Factor on the last training stage's learning rate."""
    line: str = ""
    """In a retention grid: arms of one line differ only in `second_rate`."""


@dataclass(frozen=True)
class Claim:
    """A claim: one arm ends above another, or reaches it. Claims of one text are one claim about all of their pairs."""

    text: str
    better: str
    worse: str
    reaches: bool = False
    """The claim also holds if the first arm is less than a point behind."""


def sentence(text: str) -> str:
    """`text` as the beginning of a sentence. A Greek letter stays as it is: α is a symbol, Α another."""
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


@dataclass(frozen=True)
class Grid:
    """Arms to compare, and claims about them."""

    name: str
    help: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...] = ()
    base: str = ""
    """The paper's figure without training, for a grid with its figures."""
    tuned: bool = False
    """Each arm gets its own learning rate from a sweep on a validation split: at the importance mask's rate a random
    mask would be an unfair control (arXiv 2405.02596)."""
    free: tuple[str, ...] = ()
    """Settings of some arms that `--set` may change for the others."""
    lines: tuple[Claim, ...] = ()
    """Claims of a retention grid: in one line the second stage loses less of the first stage's skill than in
    another."""
    stronger: tuple[Claim, ...] = ()
    """Claims that an arm ends above another because its first stage does."""
    moved: tuple[Claim, ...] = ()
    """Claims that one arm's mask holds the elements that training moves most in another arm, an unmasked one."""
    sequence: tuple[Claim, ...] = ()
    """Claims of a grid of Systems in sequence: one arm forgets less than another."""

    @property
    def every_stage(self) -> bool:
        """Whether the adapter that each training stage leaves is evaluated, not only the last."""
        return bool(self.lines or self.sequence or self.stronger)

    def arm(self, name: str) -> Arm:
        """The arm with this name."""
        return next(each for each in self.arms if each.name == name)
