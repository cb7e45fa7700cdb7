"""Results of a grid's finished runs: accuracies by arm, and a verdict on each claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Protocol

from lorapar_ray.ablations.grid import Claim, sentence
from lorapar_ray.ablations.sizes import elements_of
from lorapar_ray.ablations.verdicts import (
    ENDINGS,
    NO_SEED,
    Effect,
    Found,
    Uncompared,
    all_of,
    changes_of,
    ending,
    left_out,
    paired_effect,
    shown,
)
from lorapar_ray.boundary import read_lines
from lorapar_ray.datasets.rows import read_columns
from lorapar_ray.evaluation.decisions import decisions
from lorapar_ray.evaluation.statistics import mcnemar_exact, wilson_interval
from lorapar_ray.evaluation.task_files import result_file, rows_file

Right = dict[str, bool]
"""Whether each question was answered correctly."""


Range = tuple[float, float]
"""The least and the most over seeds."""


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    seed: int
    right: Right
    learning_rate: float
    active_share: float | None
    """Share of the adapter's elements that stage 1 trains."""
    elements: int | None = None
    """Number of the elements that stage 1 trains: shares of adapters of different ranks do not compare."""


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
    learning_rate: Range
    active_share: Range | None
    elements: Range | None = None
    end: str = ""
    """"lowest" or "highest" if the learning rate is at that end of the arm's sweep."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one claim."""

    claim: Claim
    found: Found
    reached: tuple[float, float]
    """The accuracies of the two arms."""
    effect: Effect
    """The difference in accuracy."""
    p: float
    """Exact sign test over the questions that differ in the mean over seeds; for one seed that is McNemar's."""
    sentence: str


class Decided(Protocol):
    """A verdict on a claim."""

    @property
    def claim(self) -> Claim:
        """What it is on."""

    @property
    def found(self) -> Found:
        """Whether it held."""


@dataclass(frozen=True)
class Overall:
    """The verdict on a claim that says the same of several comparisons."""

    found: Found
    sentence: str


def read_outcome(folder: Path, seed: int, last: str, learning_rate: float, task: str = "") -> Outcome | None:
    """A run's answers after its last stage; None if it has not been evaluated.

    Args:
        task: of lm-eval; empty: the test rows.
    """
    right = task_answers(folder / "eval", last, task) if task else row_answers(folder / "eval", last)
    if right is None:
        return None
    lines = read_lines(folder / "metrics" / "sft.jsonl")
    share: float | None = lines[-1].get("active_share") if lines else None
    whole = elements_of(folder)
    elements = None if share is None or whole is None else round(share * whole)
    return Outcome(seed, right, learning_rate, share, elements)


def row_answers(root: Path, model: str) -> Right | None:
    """Which test rows a model answered correctly."""
    if not (root / f"{model}.json").is_file():
        return None
    return {row["id"]: row["right"] for row in read_columns(root / f"{model}.parquet", {"id": str, "right": bool})}


def task_answers(root: Path, model: str, task: str) -> Right | None:
    """Which questions of a task of lm-eval a model answered correctly, by the task's first metric that says so of all.

    None if no metric does, or the task has no result yet. A question's key has the metric in it, so that runs of
    different metrics have no question in common.
    """
    if not result_file(root, model, task).is_file():
        return None
    columns = {"task": str, "id": str, "metric": str, "filter": str, "right": object}
    rows = (row | {"asked": task} for row in read_columns(rows_file(root, model, task), columns))
    for (_, metric, kind), right in decisions(rows).items():
        return {f"{metric}, {kind}: {question}": each for question, each in right.items()}
    return None


def validation_loss(folder: Path, *, best: bool) -> float:
    """A finished run's validation loss: the lowest, or after the last step; infinite if it is not a number.

    Args:
        best: the runs that are compared keep the adapter of the lowest loss; else that of the last step.
    """
    losses = [float(line["loss"]) for line in read_lines(folder / "metrics" / "sft_validation.jsonl")]
    finite = [loss if isfinite(loss) else inf for loss in losses] or [inf]
    return min(finite) if best else finite[-1]


def summarise(arm: str, outcomes: Sequence[Outcome], end: str = "") -> Summary:
    """One arm's row of the table; `outcomes` is not empty.

    Args:
        end: see `Summary`.
    """
    accuracy = sum(sum(each.right.values()) for each in outcomes) / sum(len(each.right) for each in outcomes)
    n = len({question for each in outcomes for question in each.right})
    by_seed = {each.seed: sum(each.right.values()) / len(each.right) for each in outcomes}
    interval = wilson_interval(round(accuracy * n), n)
    rates = [each.learning_rate for each in outcomes]
    shares, elements = _range([each.active_share for each in outcomes]), _range([each.elements for each in outcomes])
    return Summary(arm, accuracy, interval, n, by_seed, (min(rates), max(rates)), shares, elements, end)


def _range(values: Sequence[float | None]) -> Range | None:
    known = [each for each in values if each is not None]
    return (min(known), max(known)) if known else None


def decide(
    claim: Claim,
    better: Sequence[Outcome],
    worse: Sequence[Outcome],
    seeds: Sequence[int] = (),
    ends: Mapping[str, str] | None = None,
    comparisons: int = 1,
) -> Verdict | Uncompared:
    """Compare two arms on the seeds and questions that both have.

    Args:
        seeds: the planned ones, of which the sentence names those without results.
        ends: arms whose learning rate is at an end of their sweep, and which ("lowest" or "highest"): a better rate may
            be beyond it, so nothing is decided about them.
        comparisons: see `effect`.
    """
    theirs = {each.seed: each.right for each in worse}
    pairs = {each.seed: _paired(each.right, theirs[each.seed]) for each in better if each.seed in theirs}
    pairs = {seed: pair for seed, pair in pairs.items() if pair[0]}
    if not pairs:
        return Uncompared(claim, NO_SEED)
    found = paired_effect(list(pairs.values()), comparisons)
    changes = changes_of(list(pairs.values()))
    p = mcnemar_exact(sum(each > 0 for each in changes), sum(each < 0 for each in changes))
    at_end = [f"{arm}'s is the {ends[arm]}" for arm in (claim.better, claim.worse) if ends and arm in ends]
    verdict = "undecided" if at_end else found.found(reaches=claim.reaches)
    answers = sum(len(ours) for ours, _ in pairs.values())
    right, other_right = (sum(sum(pair[side].values()) for pair in pairs.values()) / answers for side in (0, 1))
    words = _sentence(claim, verdict, (right, other_right), found, p, at_end) + left_out(seeds, pairs)
    return Verdict(claim, verdict, (right, other_right), found, p, words)


def sum_up(
    claims: Sequence[Claim], verdicts: Sequence[Decided], compares: Callable[[Claim], bool] = lambda _: True
) -> list[Overall]:
    """One verdict for each text that several claims share and of which a line is known (see `all_of`).

    Args:
        compares: whether both arms of a claim are in this run.
    """
    found = []
    for text in dict.fromkeys(claim.text for claim in claims):
        same = [claim for claim in claims if claim.text == text]
        lines, dropped = len(same), sum(not compares(claim) for claim in same)
        known = [each.found for each in verdicts if each.claim.text == text]
        if lines > 1 and known:
            counts = {"held": 0, "did not hold": 0, "undecided": 0, "not finished": lines - dropped - len(known)}
            counts["not in this run"] = dropped
            for each in known:
                counts["did not hold" if each == "not held" else each] += 1
            whole = all_of(known, lines)
            said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            said_of = f"{sentence(text)}, in each of {lines} comparisons: {said}"
            found.append(Overall(whole, f"{said_of}, {ENDINGS[whole]}."))
    return found


def _paired(ours: Right, theirs: Right) -> tuple[Right, Right]:
    """Two runs' answers to the questions that both answered."""
    common = sorted(ours.keys() & theirs.keys())
    return {each: ours[each] for each in common}, {each: theirs[each] for each in common}


def _sentence(
    claim: Claim, found: Found, reached: Sequence[float], difference: Effect, p: float, at_end: Sequence[str]
) -> str:
    better, worse = (f"{each:.1%}" for each in reached)
    test = "sign test over questions" if difference.seeds > 1 else "McNemar test"
    end = ending(difference, found, reaches=claim.reaches)
    if at_end:
        end = (
            f"but of the learning rates of its sweep {' and '.join(at_end)}, so a better one may be beyond (--rates), "
            f"{ENDINGS[found]}."
        )
    return (
        f"{sentence(claim.text)}: {claim.better} reached {better} and {claim.worse} {worse}, a difference of "
        f"{100 * difference.difference:+.1f} points ({shown(difference)}; exact {test}, p = {p:.2g}), "
        f"{end}"
    )
