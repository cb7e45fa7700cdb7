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
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

from lorapar_ray.ablations.grid import Claim, sentence
from lorapar_ray.ablations.results import Right
from lorapar_ray.ablations.tables import Table, bullets
from lorapar_ray.ablations.verdicts import Effect, Found, Groups, effect, ending, shown
from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import read_columns
from lorapar_ray.datasets.sources import task_of
from lorapar_ray.errors import UserError

Answers = dict[int, Right]
"""Whether each System's test rows were answered correctly, by question."""
Changes = Mapping[str, int]
"""By question: 1, 0 or −1."""
Place = tuple[float, float]
"""Gain and cost."""


@dataclass(frozen=True)
class Point:
    """One finished run."""

    seed: int
    gained: Changes
    """The second stage's skill in that stage: 1 where it is right only after it, −1 where only before."""
    lost: Changes
    """The first stage's skill in the second stage: 1 where it is right only before it, −1 where only after."""

    @cached_property
    def gain(self) -> float:
        """Change of the second stage's skill in that stage."""
        return sum(self.gained.values()) / len(self.gained)

    @cached_property
    def cost(self) -> float:
        """Loss of the first stage's skill in the second stage."""
        return sum(self.lost.values()) / len(self.lost)

    def without(self, question: str) -> Place:
        """Gain and cost without a question; it is of one of the two skills, which has others too."""
        return _mean_without(self.gained, question, self.gain), _mean_without(self.lost, question, self.cost)


def _mean_without(changes: Changes, question: str, mean: float) -> float:
    if question not in changes:
        return mean
    return (mean * len(changes) - changes[question]) / (len(changes) - 1)


@dataclass(frozen=True)
class Kept:
    """The verdict on a claim."""

    claim: Claim
    found: Found
    effect: Effect
    """Difference of the costs at equal gain; above 0: the better line keeps more."""
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
    for row in read_columns(labels, {"task": str, "system": int}):
        votes.setdefault(row["task"], Counter())[row["system"]] += 1
    return {task: min(found, key=lambda system: (-found[system], system)) for task, found in votes.items()}


def answers_in(file: Path, systems: Mapping[str, int], by: Literal["task", "id"] = "task") -> Answers:
    """A table of answers by System; a System without a question is left out.

    Args:
        systems: the System of each task, or of each question.
    """
    right: Answers = {}
    for row in read_columns(file, {"id": str, by: str, "right": bool}):
        if row[by] in systems:
            right.setdefault(systems[row[by]], {})[row["id"]] = row["right"]
    return right


def share_right(right: Right) -> float:
    """The accuracy."""
    return sum(right.values()) / len(right)


def read_point(folder: Path, config: Config) -> Point | None:
    """The point of a run with two training stages; None if it is not evaluated, or a System has no task."""
    files = [folder / "eval" / f"{stage}.parquet" for stage in config.order]
    if len(files) != 2 or not all(file.is_file() for file in files):
        return None
    systems = systems_of_tasks(folder / "labels")
    before, after = (answers_in(file, systems) for file in files)
    own = {"sft": config.sft.systems[0], "grpo": config.grpo.systems[0]}
    first, second = (own[stage] for stage in config.order)
    if first == second or not {first, second} <= before.keys() & after.keys():
        return None
    return Point(config.seed, _change(before[second], after[second]), _change(after[first], before[first]))


def _change(before: Right, after: Right) -> dict[str, int]:
    return {question: right - before[question] for question, right in after.items()}


def mean_of(points: Sequence[Point]) -> tuple[float, float]:
    """Gain and cost, as means over seeds."""
    return sum(each.gain for each in points) / len(points), sum(each.cost for each in points) / len(points)


def joined(lines: Mapping[str, Mapping[str, Sequence[Point]]]) -> dict[str, list[Point]]:
    """The points of all arms of each line."""
    return {line: [point for points in arms.values() for point in points] for line, arms in lines.items()}


def cost_at(line: Sequence[Place], gain: float) -> float:
    """The cost at a gain between 0 and the largest of `line`, on the line from (0, 0) through its places."""
    known = [(0.0, 0.0), *sorted(place for place in line if place[0] > 0)]
    for (left, low), (right, high) in pairwise(known):
        if left <= gain <= right:
            return high if right == left else low + (high - low) * (gain - left) / (right - left)
    raise ValueError(f"gain {gain} is beyond the line's {known[-1][0]}")


def kept_more(better: Sequence[Place], worse: Sequence[Place]) -> tuple[float, float]:
    """The gain that both lines reach, at least 0, and how much less the better one costs there: nothing at 0."""
    gain = min(max(gain for gain, _ in line) for line in (better, worse))
    return (gain, cost_at(worse, gain) - cost_at(better, gain)) if gain > 0 else (0.0, 0.0)


def compare(claim: Claim, lines: Mapping[str, Sequence[Point]]) -> Kept | None:
    """The verdict on a claim about two lines; None if no seed has a gain on both."""
    sides = [lines.get(name, ()) for name in (claim.better, claim.worse)]
    pairs, gains, differences = [], [], []
    for seed in sorted({each.seed for each in sides[0]} & {each.seed for each in sides[1]}):
        pair = [[each for each in side if each.seed == seed] for side in sides]
        gain, difference = kept_more(*([(each.gain, each.cost) for each in side] for side in pair))
        if gain > 0:
            pairs.append(pair)
            gains.append(gain)
            differences.append(difference)
    if not pairs:
        return None
    found = effect(differences, _by_question(pairs, sum(differences) / len(differences)), size=1, largest=2)
    verdict = found.found()
    return Kept(claim, verdict, found, tuple(gains), _sentence(claim, verdict, found, gains))


def _by_question(pairs: Sequence[Sequence[Sequence[Point]]], difference: float) -> Groups:
    """Each question's contribution to the difference, in a group for each skill, by the jackknife.

    A cost at equal gain is no mean over questions: a question of the second skill moves the gain. So a question
    contributes n − 1 times what leaving it out takes away.
    """

    def without(question: str) -> float:
        rest = (kept_more(*([each.without(question) for each in side] for side in pair))[1] for pair in pairs)
        return sum(rest) / len(pairs)

    groups = []
    points = [each for pair in pairs for side in pair for each in side]
    for questions in ({q for each in points for q in each.gained}, {q for each in points for q in each.lost}):
        n = len(questions)
        own = [(n - 1) * (difference - without(question)) for question in sorted(questions)] if n > 1 else [0.0]
        groups.append([difference / 2 + each for each in own])
    return groups


def _sentence(claim: Claim, found: Found, difference: Effect, gains: Sequence[float]) -> str:
    mean = 100 * sum(gains) / len(gains)
    return (
        f"{sentence(claim.text)}: at a gain of {mean:.1f} points in the second stage's skill, {claim.better} kept "
        f"{100 * difference.difference:+.1f} points more of the first stage's than {claim.worse} "
        f"({shown(difference)}; seeds that gained on both), {ending(difference, found)}"
    )


def table(lines: Mapping[str, Mapping[str, Sequence[Point]]], kept: Sequence[Kept]) -> Table:
    """The points, means over seeds, and a line for each claim.

    Args:
        lines: points by line and arm.
    """
    rows = []
    for line, arms in lines.items():
        for arm, points in arms.items():
            gain, cost = (f"{100 * each:+.1f} points" for each in mean_of(points))
            rows.append((line, arm, gain, cost, str(len(points))))
    head = ("line", "arm", "gained in the second skill", "lost of the first", "seeds")
    return Table("retention", head, rows, "Skills gained and lost in the second stage", bullets(kept))
