"""The first training stage's skill that the second stage loses, against the second stage's gain.

A System's skill is the accuracy on the test rows of the tasks whose training questions are mostly labelled with that
System. Each run gives a point: the second skill's gain in the second stage, and the first skill's loss. Runs that
differ only in the second stage's learning rate form a line that starts at (0, 0), without training
(`lorapar_ray.ablations.equal_gain` compares two of them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from lorapar_ray.ablations.results import Right
from lorapar_ray.ablations.tables import Numbers, Said, Table, bullets
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
Arms = Mapping[str, "Sequence[Point]"]
"""A line's points, by arm."""


@dataclass(frozen=True)
class Point:
    """One finished run."""

    seed: int
    gained: Changes
    """The second stage's skill in that stage: 1 where it is right only after it, −1 where only before."""
    lost: Changes
    """The first stage's skill in the second stage: 1 where it is right only before it, −1 where only after."""
    first: Right
    """The first stage's skill before the second stage."""

    @cached_property
    def gain(self) -> float:
        """Change of the second stage's skill in that stage."""
        return sum(self.gained.values()) / len(self.gained)

    @cached_property
    def cost(self) -> float:
        """Loss of the first stage's skill in the second stage."""
        return sum(self.lost.values()) / len(self.lost)

    @property
    def start(self) -> float:
        """The first stage's skill before the second stage."""
        return share_right(self.first)

    def without(self, question: str) -> Place:
        """Gain and cost without a question; it is of one of the two skills, which has others too."""
        return _mean_without(self.gained, question, self.gain), _mean_without(self.lost, question, self.cost)


def _mean_without(changes: Changes, question: str, mean: float) -> float:
    if question not in changes:
        return mean
    return (mean * len(changes) - changes[question]) / (len(changes) - 1)


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
    gained, lost = _change(before[second], after[second]), _change(after[first], before[first])
    return Point(config.seed, gained, lost, before[first])


def _change(before: Right, after: Right) -> dict[str, int]:
    return {question: right - before[question] for question, right in after.items()}


def mean_of(points: Sequence[Point]) -> tuple[float, float]:
    """Gain and cost, as means over seeds."""
    return sum(each.gain for each in points) / len(points), sum(each.cost for each in points) / len(points)


def table(lines: Mapping[str, Arms], kept: Sequence[Said]) -> Table:
    """The points, means over seeds, and a line for each claim.

    Args:
        lines: points by line and arm.
    """
    head = ("line", "arm", "gained in the second skill", "first skill before", "after", "lost of the first", "seeds")
    rows, numbers = [], list[Numbers]()
    for line, arms in lines.items():
        for arm, points in arms.items():
            gain, cost = mean_of(points)
            begun = sum(each.start for each in points) / len(points)
            levels = (f"{begun:.1%}", f"{begun - cost:.1%}")
            shown = (f"{100 * gain:+.1f} points", *levels, f"{100 * cost:+.1f} points")
            rows.append((line, arm, *shown, str(len(points))))
            own = (line, arm, gain, begun, begun - cost, cost, len(points))
            numbers.append(dict(zip(head, own, strict=True)))
    return Table("retention", head, rows, "Skills gained and lost in the second stage", bullets(kept), numbers)
