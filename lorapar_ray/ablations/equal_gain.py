"""Two lines of runs at equal gain in the second skill: which one loses less of the first?

For each seed, two lines are compared at the largest gain that both reach, with linear interpolation between points.

A line that learnt less of the first skill has less to lose. So a claim is decided only if the line that lost less is
shown to have begun with as much; and only if both lines gained in every seed, since seeds chosen by their gain are no
sample of all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lorapar_ray.ablations.grid import Claim, sentence
from lorapar_ray.ablations.retention import Arms, Place, Point
from lorapar_ray.ablations.verdicts import (
    ENDINGS,
    Effect,
    Found,
    Groups,
    Uncompared,
    effect,
    ending,
    paired_effect,
    shown,
    too_little_to_lose,
    with_as_much_to_lose,
)

Pair = tuple[Sequence[Point], Sequence[Point]]
"""One seed's points of two lines."""
MOST_NAMED = 4
"""Arms that a sentence names for missing runs."""


@dataclass(frozen=True)
class Kept:
    """The verdict on a claim."""

    claim: Claim
    found: Found
    effect: Effect
    """Difference of the costs at equal gain; above 0: the better line keeps more."""
    starts: Effect
    """How much more of the first skill the better line had before the second stage."""
    gains: tuple[float, ...]
    """The gain at which each seed was compared."""
    sentence: str


def cost_at(line: Sequence[Place], gain: float) -> float:
    """The cost at a gain between 0 and the largest of `line`, on the line from (0, 0) through its places."""
    known = [(0.0, 0.0), *sorted(place for place in line if place[0] > 0)]
    for (left, low), (right, high) in pairwise(known):
        if left <= gain <= right:
            return high if right == left else low + (high - low) * (gain - left) / (right - left)
    raise ValueError(f"gain {gain} is beyond the line's {known[-1][0]}")


def costs_at_equal_gain(better: Sequence[Place], worse: Sequence[Place]) -> tuple[float, float, float]:
    """The gain that both lines reach, at least 0, and what each of them costs there: nothing at 0."""
    gain = min(max(gain for gain, _ in line) for line in (better, worse))
    return (gain, cost_at(better, gain), cost_at(worse, gain)) if gain > 0 else (0.0, 0.0, 0.0)


def kept_more(better: Sequence[Place], worse: Sequence[Place]) -> float:
    """How much less the better line costs at equal gain."""
    _, own, other = costs_at_equal_gain(better, worse)
    return other - own


def compare(
    claim: Claim,
    lines: Mapping[str, Arms],
    planned: Mapping[str, Collection[str]],
    seeds: Sequence[int],
    comparisons: int = 1,
) -> Kept | Uncompared:
    """The verdict on a claim about two lines.

    Only seeds are compared of which every arm of both lines has a point: the gain that a line reaches, and so the
    comparison, depends on which of its learning rates are there.

    Args:
        planned: each line's arms.
        seeds: the planned ones.
        comparisons: see `effect`.
    """
    whole, missing = _whole_seeds((claim.better, claim.worse), lines, planned, seeds)
    without = f"; missing: {_listed(missing)}" if missing else ""
    if not whole:
        return Uncompared(claim, f"no seed has results of all their runs{without}")
    flat = [_flat(name, side, whole) for side, name in enumerate((claim.better, claim.worse))]
    said = [words for words, _ in flat if words]
    pairs = [pair for seed, pair in whole.items() if not any(seed in none for _, none in flat)]
    if not pairs:
        first, second = _begun(list(whole.values()))
        had = f"before it {claim.better} had {first:.1%} of the first skill and {claim.worse} {second:.1%}"
        return Uncompared(claim, f"{' and '.join(said)}, which leaves no equal gain ({had}{without})")
    costs = [costs_at_equal_gain(*_places(pair)) for pair in pairs]
    differences = [other - own for _, own, other in costs]
    by_question = _by_question(pairs, sum(differences) / len(differences))
    kept = effect(differences, by_question, size=1, largest=2, comparisons=comparisons)
    starts = paired_effect([(_start(pair[0]), _start(pair[1])) for pair in pairs], comparisons)
    verdict = "undecided" if said else with_as_much_to_lose(kept.found(), starts)
    words = _sentence(claim, verdict, kept, starts, pairs, costs, said)
    words += f" Left out for missing results: {_listed(missing)}." if missing else ""
    return Kept(claim, verdict, kept, starts, tuple(gain for gain, *_ in costs), words)


def _flat(name: str, side: int, pairs: Mapping[int, Pair]) -> tuple[str, list[int]]:
    """The seeds in which a line gained nothing, in words and as numbers."""
    none = [seed for seed, pair in pairs.items() if max(each.gain for each in pair[side]) <= 0]
    numbers = ", ".join(map(str, none))
    words = f"{name} gained nothing in the second stage in {len(none)} of {len(pairs)} seeds ({numbers})"
    return words if none else "", none


def _whole_seeds(
    names: tuple[str, str], lines: Mapping[str, Arms], planned: Mapping[str, Collection[str]], seeds: Sequence[int]
) -> tuple[dict[int, Pair], dict[str, list[int]]]:
    """Two lines' points of the seeds of which none is missing, and the missing ones: seeds by arm."""
    found = {
        (arm, point.seed): point for name in names for arm, points in lines.get(name, {}).items() for point in points
    }
    arms = [list(planned[name]) for name in names]
    missing: dict[str, list[int]] = {}
    for arm in (*arms[0], *arms[1]):
        if without := [seed for seed in seeds if (arm, seed) not in found]:
            missing[arm] = without
    whole = [seed for seed in seeds if not any(seed in each for each in missing.values())]
    return {seed: ([found[a, seed] for a in arms[0]], [found[a, seed] for a in arms[1]]) for seed in whole}, missing


def _listed(missing: Mapping[str, Sequence[int]]) -> str:
    found = [f"{arm}, seed {', '.join(map(str, seeds))}" for arm, seeds in missing.items()]
    return "; ".join(found[:MOST_NAMED]) + (f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else "")


def _places(pair: Pair) -> tuple[list[Place], list[Place]]:
    first, second = ([(each.gain, each.cost) for each in side] for side in pair)
    return first, second


def _start(line: Sequence[Point]) -> dict[str, float]:
    """The first skill before the second stage, by question: the mean over a line's runs, whose first stage is equal."""
    return {question: sum(each.first[question] for each in line) / len(line) for question in line[0].first}


def _by_question(pairs: Sequence[Pair], difference: float) -> Groups:
    """Each question's contribution to the difference, in a group for each skill, by the jackknife.

    A cost at equal gain is no mean over questions: a question of the second skill moves the gain. So a question
    contributes n − 1 times what leaving it out takes away.
    """

    def without(question: str) -> float:
        rest = (kept_more(*([each.without(question) for each in side] for side in pair)) for pair in pairs)
        return sum(rest) / len(pairs)

    groups = []
    points = [each for pair in pairs for side in pair for each in side]
    for questions in ({q for each in points for q in each.gained}, {q for each in points for q in each.lost}):
        n = len(questions)
        own = [(n - 1) * (difference - without(question)) for question in sorted(questions)] if n > 1 else [0.0]
        groups.append([difference / 2 + each for each in own])
    return groups


def _sentence(
    claim: Claim,
    found: Found,
    kept: Effect,
    starts: Effect,
    pairs: Sequence[Pair],
    costs: Sequence[tuple[float, float, float]],
    flat: Sequence[str],
) -> str:
    """The claim's sentence.

    Args:
        costs: each seed's gain, and the cost of either line there.
        flat: what says of a line that it gained nothing in some seeds.
    """
    gain, *lost = (sum(each) / len(costs) for each in zip(*costs, strict=True))
    begun = _begun(pairs)
    fell = [f"{start:.1%} to {start - cost:.1%}" for start, cost in zip(begun, lost, strict=True)]
    said = (
        f"{sentence(claim.text)}: at a gain of {100 * gain:.1f} points in the second stage's skill, {claim.better} "
        f"kept {100 * kept.difference:+.1f} points more of the first stage's than {claim.worse} ({shown(kept)}); the "
        f"first stage's went from {fell[0]} in {claim.better} and from {fell[1]} in {claim.worse}, "
    )
    if flat:
        return f"{said}but {' and '.join(flat)}, and the others are chosen by their gain, {ENDINGS['undecided']}."
    if kept.found() != found:
        had = f"{claim.better} began {100 * starts.difference:+.1f} points above {claim.worse}"
        return said + too_little_to_lose(claim, kept, starts, had, "of it ")
    return said + ending(kept, found)


def _begun(pairs: Sequence[Pair]) -> list[float]:
    """Each line's first skill before the second stage, the mean over seeds."""
    return [
        sum(each.start for pair in pairs for each in pair[side]) / sum(len(p[side]) for p in pairs) for side in (0, 1)
    ]
