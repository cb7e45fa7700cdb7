"""The first training stage's skill that the second stage loses, against the second stage's gain.

A System's skill is the accuracy on the test rows of the tasks whose training questions are mostly labelled with that
System. Each run gives a point: the second skill's gain in the second stage, and the first skill's loss. Runs that
differ only in the second stage's learning rate form a line that starts at (0, 0), without training. For each seed, two
lines are compared at equal gain: the largest gain that both reach, with linear interpolation between points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from lorapar_ray.ablations.grids import Claim, sentence
from lorapar_ray.ablations.results import ENDINGS, Found, over_seeds, shown_interval
from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.datasets.sources import task_of
from lorapar_ray.errors import UserError

Skills = dict[int, float]
"""Accuracy on each System's test rows."""


@dataclass(frozen=True)
class Point:
    """One finished run."""

    seed: int
    gain: float
    """Change of the second stage's skill in that stage."""
    cost: float
    """Loss of the first stage's skill in the second stage."""


@dataclass(frozen=True)
class Kept:
    """The verdict on a claim."""

    claim: Claim
    found: Found
    difference: float
    """Difference of the costs at equal gain; above 0: the better line keeps more."""
    interval: tuple[float, float] | None
    """95 %, over seeds (Student's t); None: fewer than three."""
    gains: tuple[float, ...]
    """The gain at which each seed was compared."""
    sentence: str


def require_tasks(config: Config) -> None:
    """Check that both Systems may have a task whose skill can be measured.

    Raises:
        UserError: labels do not follow the questions, both stages train one System, or fewer than two tasks are both
            trained and tested.
    """
    label = config.label
    if label.strategy == "random" or label.shuffled:
        cause = "label.shuffled: true" if label.shuffled else "label.strategy: random"
        raise UserError(f"{cause}: a task's System would be arbitrary, so no skill can be measured; use other labels")
    if config.sft.systems[0] == config.grpo.systems[0]:
        raise UserError("sft.systems and grpo.systems begin with the same System; this grid needs two different ones")
    trained, tested = ({task_of(source) for source in part} for part in (config.data.train, config.data.test))
    if len(both := sorted(trained & tested)) < 2:
        raise UserError(
            f"data: a skill is the accuracy on a task, and {_tasks(both)} in both data.train and data.test; "
            "this grid needs two or more, such as those of quickstart.yaml"
        )


def _tasks(names: Sequence[str]) -> str:
    return f"only '{names[0]}' is" if names else "no task is"


def require_skills_of(labels: Path, config: Config) -> None:
    """Check that each of the two stages has a task of its System, before anything trains.

    Raises:
        UserError: a System has no task with most of its questions.
    """
    found = systems_of_tasks(labels)
    for system in (config.sft.systems[0], config.grpo.systems[0]):
        if system not in found.values():
            tasks = ", ".join(f"'{task}' {own}" for task, own in sorted(found.items()))
            raise UserError(
                f"label: most questions of no task are System {system} ({tasks}), so its skill cannot be measured; "
                "choose other tasks, or give each entry of data.train its system (label.strategy: source)"
            )


def systems_of_tasks(labels: Path) -> dict[str, int]:
    """For each task, the label of most of its training questions."""
    votes: dict[str, Counter[int]] = {}
    for row in read_table(labels, {"task": str, "system": int}):
        votes.setdefault(row["task"], Counter())[row["system"]] += 1
    return {task: min(found, key=lambda system: (-found[system], system)) for task, found in votes.items()}


def skills_in(file: Path, systems: Mapping[str, int], by: Literal["task", "id"] = "task") -> Skills:
    """Skills from a table of answers; a System without a question is left out.

    Args:
        systems: the System of each task, or of each question.
    """
    right: dict[int, list[bool]] = {}
    for row in read_table(file, {by: str, "right": bool}):
        if row[by] in systems:
            right.setdefault(systems[row[by]], []).append(row["right"])
    return {system: sum(each) / len(each) for system, each in right.items()}


def read_point(folder: Path, config: Config) -> Point | None:
    """The point of a run with two training stages; None if it is not evaluated, or a System has no task."""
    files = [folder / "eval" / f"{stage}.parquet" for stage in config.order]
    if len(files) != 2 or not all(file.is_file() for file in files):
        return None
    systems = systems_of_tasks(folder / "labels")
    before, after = (skills_in(file, systems) for file in files)
    own = {"sft": config.sft.systems[0], "grpo": config.grpo.systems[0]}
    first, second = (own[stage] for stage in config.order)
    if first == second or not {first, second} <= before.keys() & after.keys():
        return None
    return Point(config.seed, after[second] - before[second], before[first] - after[first])


def mean_of(points: Sequence[Point]) -> tuple[float, float]:
    """Gain and cost, as means over seeds."""
    return sum(each.gain for each in points) / len(points), sum(each.cost for each in points) / len(points)


def joined(lines: Mapping[str, Mapping[str, Sequence[Point]]]) -> dict[str, list[Point]]:
    """The points of all arms of each line."""
    return {line: [point for points in arms.values() for point in points] for line, arms in lines.items()}


def cost_at(points: Sequence[Point], gain: float) -> float:
    """The cost at a gain between 0 and the largest of `points`, on the line from (0, 0) through the points."""
    line = [(0.0, 0.0), *sorted((each.gain, each.cost) for each in points if each.gain > 0)]
    for (left, low), (right, high) in pairwise(line):
        if left <= gain <= right:
            return high if right == left else low + (high - low) * (gain - left) / (right - left)
    raise ValueError(f"gain {gain} is beyond the line's {line[-1][0]}")


def compare(claim: Claim, lines: Mapping[str, Sequence[Point]]) -> Kept | None:
    """The verdict on a claim about two lines; None if no seed has a gain on both."""
    differences, gains = [], []
    better, worse = (lines.get(name, ()) for name in (claim.better, claim.worse))
    for seed in sorted({each.seed for each in better} & {each.seed for each in worse}):
        pair = [[each for each in line if each.seed == seed] for line in (better, worse)]
        gain = min(max(each.gain for each in line) for line in pair)
        if gain > 0:
            mine, theirs = (cost_at(line, gain) for line in pair)
            differences.append(theirs - mine)
            gains.append(gain)
    if not differences:
        return None
    difference, interval, found = over_seeds(differences)
    return Kept(claim, found, difference, interval, tuple(gains), _sentence(claim, found, difference, interval, gains))


def _sentence(
    claim: Claim, found: Found, difference: float, interval: tuple[float, float] | None, gains: Sequence[float]
) -> str:
    mean = 100 * sum(gains) / len(gains)
    return (
        f"{sentence(claim.text)}: at a gain of {mean:.1f} points in the second stage's skill, {claim.better} kept "
        f"{100 * difference:+.1f} points more of the first stage's than {claim.worse} "
        f"({len(gains)} seeds that gained on both; {shown_interval(interval)}), {ENDINGS[found]}"
    )


def markdown(lines: Mapping[str, Mapping[str, Sequence[Point]]], kept: Sequence[Kept]) -> str:
    """A table of the points, means over seeds, and a line for each claim.

    Args:
        lines: points by line and arm.
    """
    text = [
        "| line | arm | gained in the second skill | lost of the first | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line, arms in lines.items():
        for arm, points in arms.items():
            gain, cost = (100 * each for each in mean_of(points))
            text.append(f"| {line} | {arm} | {gain:+.1f} points | {cost:+.1f} points | {len(points)} |")
    if kept:
        text += ["", *(f"- **{each.found}**: {each.sentence}" for each in kept)]
    return "\n".join(text) + "\n"
