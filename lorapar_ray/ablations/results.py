"""Results of a grid's finished runs: accuracies by arm, and a verdict on each claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Literal

from lorapar_ray.ablations.grids import Claim, sentence
from lorapar_ray.boundary import read_lines
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.evaluation.statistics import mcnemar_exact, paired, wilson_interval

Found = Literal["held", "not held", "undecided"]
ENDINGS: dict[Found, str] = {
    "held": "so the claim held here.",
    "not held": "so the claim did not hold here.",
    "undecided": "so it is undecided at this size.",
}
Right = dict[str, bool]
"""Whether each question was answered correctly."""
MARGIN = 0.01
"""A difference is negligible if its whole interval is below this (1 point)."""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t at 97.5 %, for 1, 2, … degrees of freedom; beyond the last 1.96 + 2.6 / df approximates it."""


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    seed: int
    right: Right
    learning_rate: float
    active_share: float | None
    """Share of the adapter's elements that stage 1 trains."""


@dataclass(frozen=True)
class Summary:
    """One arm over its seeds."""

    arm: str
    accuracy: float
    interval: tuple[float, float]
    """95 % (Wilson), over the questions."""
    n: int
    """Number of questions. Each counts once, however many seeds answered it: their answers are not independent."""
    by_seed: dict[int, float]
    learning_rate: float
    active_share: float | None


@dataclass(frozen=True)
class Verdict:
    """The verdict on one claim."""

    claim: Claim
    found: Found
    difference: float
    interval: tuple[float, float]
    """95 %: over seeds if there are three or more (Student's t), else over questions: for one seed Newcombe's, for two
    Student's t of each question's mean difference."""
    p: float
    """Exact sign test over the questions that differ in the mean over seeds; for one seed that is McNemar's."""
    questions: int
    seeds: int
    sentence: str


def read_outcome(folder: Path, seed: int, last: str, learning_rate: float) -> Outcome | None:
    """A run's answers after its last stage; None if it has not been evaluated."""
    file = folder / "eval" / f"{last}.parquet"
    if not (folder / "eval" / f"{last}.json").is_file():
        return None
    right = {row["id"]: row["right"] for row in read_table(file, {"id": str, "right": bool})}
    lines = read_lines(folder / "metrics" / "sft.jsonl")
    return Outcome(seed, right, learning_rate, lines[-1].get("active_share") if lines else None)


def validation_loss(folder: Path, *, best: bool) -> float:
    """A finished run's validation loss: the lowest, or after the last step; infinite if it is not a number.

    Args:
        best: the runs that are compared keep the adapter of the lowest loss; else that of the last step.
    """
    losses = [float(line["loss"]) for line in read_lines(folder / "metrics" / "sft_validation.jsonl")]
    finite = [loss if isfinite(loss) else inf for loss in losses] or [inf]
    return min(finite) if best else finite[-1]


def summarise(arm: str, outcomes: Sequence[Outcome]) -> Summary:
    """One arm's row of the table; `outcomes` is not empty."""
    accuracy = sum(sum(each.right.values()) for each in outcomes) / sum(len(each.right) for each in outcomes)
    n = len({question for each in outcomes for question in each.right})
    by_seed = {each.seed: sum(each.right.values()) / len(each.right) for each in outcomes}
    interval, first = wilson_interval(round(accuracy * n), n), outcomes[0]
    return Summary(arm, accuracy, interval, n, by_seed, first.learning_rate, first.active_share)


def decide(claim: Claim, better: Sequence[Outcome], worse: Sequence[Outcome]) -> Verdict | None:
    """Compare two arms on the seeds and questions that both have; None if there are none."""
    theirs = {each.seed: each.right for each in worse}
    seeds = [pair for each in better if each.seed in theirs and (pair := _paired(each.right, theirs[each.seed]))]
    if not seeds:
        return None
    answers = [answer for seed in seeds for answer in seed]
    changes: dict[str, list[int]] = {}
    for question, ours, other in answers:
        changes.setdefault(question, []).append(ours - other)
    by_question = [sum(each) / len(each) for each in changes.values()]
    p = mcnemar_exact(sum(each > 0 for each in by_question), sum(each < 0 for each in by_question))
    difference, interval = _difference(seeds, by_question)
    found = _found(interval, claim.reaches)
    reached = tuple(sum(each) / len(answers) for each in zip(*(each[1:] for each in answers), strict=True))
    words = _sentence(claim, found, reached, difference, interval, p, len(seeds))
    return Verdict(claim, found, difference, interval, p, len(by_question), len(seeds), words)


def _paired(ours: Right, theirs: Right) -> list[tuple[str, bool, bool]]:
    """The questions that two runs answered, and whether each of them was right."""
    return [(question, ours[question], theirs[question]) for question in sorted(ours.keys() & theirs.keys())]


def _difference(
    seeds: Sequence[Sequence[tuple[str, bool, bool]]], by_question: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """The difference in accuracy, and its interval (see `Verdict.interval`)."""
    if len(seeds) == 1:
        change = paired([theirs for _, _, theirs in seeds[0]], [ours for _, ours, _ in seeds[0]])
        return change.difference, change.interval
    if len(seeds) == 2 and len(by_question) > 1:
        return mean_interval(by_question)
    return mean_interval([sum(ours - theirs for _, ours, theirs in seed) / len(seed) for seed in seeds])


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean and its 95 % interval (Student's t); needs at least two values."""
    n = len(values)
    mean = sum(values) / n
    deviation = sqrt(sum((each - mean) ** 2 for each in values) / (n - 1))
    t = T_975[n - 2] if n - 2 < len(T_975) else 1.96 + 2.6 / (n - 1)
    reach = t * deviation / sqrt(n)
    return mean, (mean - reach, mean + reach)


def over_seeds(differences: Sequence[float]) -> tuple[float, tuple[float, float] | None, Found]:
    """Mean of a difference that a claim says is above 0, its interval over seeds, and the verdict.

    With fewer than three seeds there is no interval, and the claim is undecided.
    """
    if len(differences) < 3:
        return sum(differences) / len(differences), None, "undecided"
    mean, (low, high) = mean_interval(differences)
    return mean, (low, high), "held" if low > 0 else "not held" if high < 0 else "undecided"


def shown_interval(interval: tuple[float, float] | None) -> str:
    """An interval of a difference, in points."""
    if interval is None:
        return "too few for an interval"
    return f"95 % interval {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def _found(interval: tuple[float, float], reaches: bool) -> Found:
    """Whether an arm is better, or with `reaches` less than `MARGIN` worse, by the difference's interval."""
    low, high = interval
    if low > (-MARGIN if reaches else 0):
        return "held"
    if reaches:
        return "not held" if high < -MARGIN else "undecided"
    return "not held" if high < 0 or (low > -MARGIN and high < MARGIN) else "undecided"


def _sentence(
    claim: Claim,
    found: Found,
    reached: Sequence[float],
    difference: float,
    interval: tuple[float, float],
    p: float,
    seeds: int,
) -> str:
    low, high = (100 * bound for bound in interval)
    better, worse = (f"{each:.1%}" for each in reached)
    over, test = (f"{seeds} seeds", "sign test over questions,") if seeds > 1 else ("one seed", "McNemar")
    return (
        f"{sentence(claim.text)}: {claim.better} reached {better} and {claim.worse} {worse} over {over}, a difference "
        f"of {100 * difference:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}; exact {test} p = {p:.2g}), "
        f"{ENDINGS[found]}"
    )
