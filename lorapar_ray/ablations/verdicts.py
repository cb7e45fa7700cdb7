"""The one rule by which a grid decides a claim about two arms, from their difference and its interval.

A difference varies with the seed (another run of the same arm) and with the test questions. Its interval has both: from
the spread between seeds (Student's t) and from that between questions (Bonett and Price, "Adjusted Wald confidence
interval for a difference of binomial proportions based on paired data", 2012), added as independent errors are, by
squares (Zou and Donner, "Construction of confidence limits about effect measures", 2008). So it is wider than either.
A grid decides several claims. Each is decided by an interval of the level at which all of them hold together at 95 %
(Bonferroni): 5 % of wrong verdicts are shared among the claims.
With fewer than three seeds there is no sound measure of the spread between seeds, so no claim about arms is decided;
the interval is then over questions alone. `docs/verdicts.md` says the same to readers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot, sqrt
from statistics import NormalDist
from typing import Literal

from lorapar_ray.ablations.grid import Claim, sentence

Found = Literal["held", "not held", "undecided"]
ENDINGS: dict[Found, str] = {
    "held": "so the claim held here",
    "not held": "so the claim did not hold here",
    "undecided": "so it is undecided",
}
Groups = Sequence[Sequence[float]]
"""Contributions of questions to a difference, in groups of questions drawn separately; the difference is the sum of the
groups' means."""
Paired = tuple[Mapping[str, float], Mapping[str, float]]
"""Two arms' answers to the same questions: 1 if right, else 0."""
NO_SEED = "no seed has results of both"
"""Why a claim about two arms is not compared."""
FEWEST_SEEDS = 3
MARGIN = 0.01
"""A difference is negligible if its whole interval is below this (1 point)."""
LEVEL = 0.95
"""Of an interval, and of all deciding intervals of a grid together."""


@dataclass(frozen=True)
class Effect:
    """How much more one arm has than another, as a share of 1, of runs with the same seeds."""

    difference: float
    interval: tuple[float, float]
    """95 %: over seeds and questions; with fewer than three seeds over questions alone."""
    deciding: tuple[float, float]
    """The same at the level at which `comparisons` such intervals hold together at 95 %; it decides."""
    seeds: int
    questions: int
    comparisons: int = 1

    def found(self, *, reaches: bool = False) -> Found:
        """Whether the first arm is above the other one; with `reaches`, less than `MARGIN` below it."""
        low, high = self.deciding
        if self.seeds < FEWEST_SEEDS:
            return "undecided"
        if low > (-MARGIN if reaches else 0):
            return "held"
        if reaches:
            return "not held" if high < -MARGIN else "undecided"
        return "not held" if high < 0 or (low > -MARGIN and high < MARGIN) else "undecided"

    @property
    def reverse(self) -> Effect:
        """How much more the other arm has."""
        (low, high), (lower, higher) = self.interval, self.deciding
        return replace(self, difference=-self.difference, interval=(-high, -low), deciding=(-higher, -lower))


@dataclass(frozen=True)
class Uncompared:
    """A claim of which nothing can be compared."""

    claim: Claim
    why: str
    found: Found = "undecided"

    @property
    def sentence(self) -> str:
        """It in words."""
        return (
            f"{sentence(self.claim.text)}: {self.claim.better} and {self.claim.worse} are not compared, since "
            f"{self.why}, {ENDINGS[self.found]}."
        )


def effect(
    by_seed: Sequence[float],
    by_question: Groups = (),
    *,
    size: float | None = None,
    largest: float = 1.0,
    comparisons: int = 1,
) -> Effect:
    """The effect from each seed's difference, and from each question's contribution (its mean over seeds), if it is one
    of answers.

    Args:
        size: of a question (see `question_reach`).
        largest: the largest possible difference, at which the interval ends: 1 of two shares, 2 of two changes of
            shares.
        comparisons: claims that the grid decides, this one among them.

    Raises:
        ValueError: no seeds, or a group without questions.
    """
    if not by_seed or not all(by_question):
        raise ValueError("an effect needs at least one seed, and a question in each group")
    difference = sum(by_seed) / len(by_seed)

    def interval(level: float) -> tuple[float, float]:
        below, above = question_reach(by_question, size, level) if by_question else (0.0, 0.0)
        if len(by_seed) >= FEWEST_SEEDS:
            _, (low, _) = mean_interval(by_seed, level)
            below, above = (hypot(each, difference - low) for each in (below, above))
        return max(-largest, difference - below), min(largest, difference + above)

    usual, deciding = interval(LEVEL), interval(level_of_each(comparisons))
    return Effect(difference, usual, deciding, len(by_seed), sum(map(len, by_question)), comparisons)


def level_of_each(comparisons: int) -> float:
    """The level of so many intervals that hold together at `LEVEL` (Bonferroni)."""
    return 1 - (1 - LEVEL) / comparisons


def paired_effect(pairs: Sequence[Paired], comparisons: int = 1) -> Effect:
    """The difference of two arms' shares of right answers.

    Args:
        pairs: for each seed.
        comparisons: see `effect`.
    """
    by_seed = [(sum(ours.values()) - sum(theirs.values())) / len(ours) for ours, theirs in pairs]
    return effect(by_seed, [changes_of(pairs)], comparisons=comparisons)


def changes_of(pairs: Sequence[Paired]) -> list[float]:
    """How much more often the first arm is right, for each question: the mean over seeds."""
    changes: dict[str, list[float]] = {}
    for ours, theirs in pairs:
        for question in ours:
            changes.setdefault(question, []).append(ours[question] - theirs[question])
    return [sum(each) / len(each) for each in changes.values()]


def with_as_much_to_lose(found: Found, starts: Effect) -> Found:
    """The verdict on which of two arms lost less of a skill; undecided unless that arm had as much to lose.

    Args:
        found: "held" if the first arm lost less.
        starts: how much more of the skill the first arm had before; less than `MARGIN` below counts as as much.
    """
    shown = {"held": starts, "not held": starts.reverse}
    return found if found == "undecided" or shown[found].found(reaches=True) == "held" else "undecided"


def too_little_to_lose(claim: Claim, lost: Effect, starts: Effect, had: str, of: str = "") -> str:
    """The end of a sentence on what two arms lost that `with_as_much_to_lose` leaves undecided.

    Args:
        had: how the arms' starts differ, in words.
        of: what there was to lose, in words.
    """
    less = claim.better if lost.found() == "held" else claim.worse
    said = f"but {less} is not shown to have had as much {of}to lose"
    return f"{said} ({had}; {shown(starts)}), {ENDINGS['undecided']}."


def question_reach(groups: Groups, size: float | None = None, level: float = LEVEL) -> tuple[float, float]:
    """How far the interval over questions reaches below and above the sum of the groups' means.

    Each group gets two more questions, one for either side. So the interval has a width even if all questions agree.
    For one group of values −1, 0 and 1, which are two models' differences, this is Bonett and Price's interval.

    Args:
        size: how much one answer changes a question's contribution; None: groups have equal parts of the difference, so
            1 / their number.
    """
    size, plain, centre, variance = size or 1 / len(groups), 0.0, 0.0, 0.0
    for group in groups:
        more = [*group, size, -size]
        mean = sum(more) / len(more)
        plain += sum(group) / len(group)
        centre += mean
        variance += sum((each - mean) ** 2 for each in more) / len(more) ** 2
    reach = NormalDist().inv_cdf((1 + level) / 2) * sqrt(variance)
    return max(0.0, plain - centre + reach), max(0.0, centre + reach - plain)


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, tuple[float, float]]:
    """Mean and its interval (Student's t); needs at least two values."""
    from scipy import stats  # here: it takes half a second, and no command but a grid's needs it

    n = len(values)
    mean = sum(values) / n
    deviation = sqrt(sum((each - mean) ** 2 for each in values) / (n - 1))
    reach = float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / sqrt(n)
    return mean, (mean - reach, mean + reach)


def all_of(found: Sequence[Found], lines: int) -> Found:
    """The verdict on a claim that says the same of `lines` comparisons, of which `found` are known.

    Held if all lines are held, not held if one is not, else undecided. "Held" would need no correction for the number
    of lines, since each of them has to hold; "not held" needs the one that the lines have.
    """
    if "not held" in found:
        return "not held"
    return "held" if len(found) == lines and set(found) == {"held"} else "undecided"


def shown(effect: Effect) -> str:
    """The interval, in points, and what it is over."""
    low, high = (100 * bound for bound in effect.interval)
    seeds = "one seed" if effect.seeds == 1 else f"{effect.seeds} seeds"
    over = f"n = {effect.questions} questions"
    over = f"over {seeds} and {over}" if effect.seeds >= FEWEST_SEEDS else f"over {over} of {seeds}"
    return f"95 % interval {low:+.1f} to {high:+.1f} {over}{decided_by(effect, 100, '+.1f')}"


def decided_by(effect: Effect, scale: float, form: str) -> str:
    """The interval that decides, where it is another than that of 95 %.

    Args:
        form: format of its bounds, which are multiplied by `scale`.
    """
    if effect.comparisons == 1 or effect.seeds < FEWEST_SEEDS:
        return ""
    low, high = (format(scale * bound, form) for bound in effect.deciding)
    return f"; at {level_shown(effect.comparisons)}, which decides each of {effect.comparisons} claims, {low} to {high}"


def level_shown(comparisons: int) -> str:
    """The level of each of so many intervals."""
    return f"{100 * level_of_each(comparisons):.4g} %"


def ending(effect: Effect, found: Found, *, reaches: bool = False, within: str = f"{100 * MARGIN:g} point") -> str:
    """The end of a claim's sentence: the margin where it decides, and the verdict.

    Args:
        within: `MARGIN` in words.
    """
    if effect.seeds < FEWEST_SEEDS:
        few = "one seed does" if effect.seeds == 1 else f"{effect.seeds} seeds do"
        return f"but {few} not tell an arm from its seeds, so it is undecided (a verdict needs {FEWEST_SEEDS} seeds)."
    margin = f"less than {within} below counts as reached, " if reaches else ""
    if found == "not held" and not reaches and effect.deciding[1] >= 0:
        margin = f"a difference within {within} counts as none, "
    return f"{margin}{ENDINGS[found]}" + (" at this size." if found == "undecided" else ".")


def left_out(planned: Sequence[int], compared: Collection[int]) -> str:
    """A sentence that names the planned seeds that a verdict leaves out; empty if there are none."""
    seeds = [seed for seed in planned if seed not in compared]
    return f" {named(seeds)} left out: a run of the two has no results to compare." if seeds else ""


def named(seeds: Sequence[int]) -> str:
    """Seeds as the subject of a sentence, with its verb."""
    numbers = ", ".join(map(str, seeds))
    return f"Seed {numbers} is" if len(seeds) == 1 else f"Seeds {numbers} are"
