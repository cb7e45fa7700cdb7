"""What training on further Systems costs the earlier ones: skills after every System of a sequence.

R[k][j] is the accuracy on System j's test rows after training on System k, in the order of training. *Backward
transfer* is the mean of R[K][j] − R[j][j] over all Systems j but the last (Lopez-Paz and Ranzato, Gradient Episodic
Memory, arXiv 1706.08840, section 2): below 0, what was forgotten.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from lorapar_ray.ablations.grids import Claim, sentence
from lorapar_ray.ablations.results import ENDINGS, Found, mean_interval, over_seeds, shown_interval
from lorapar_ray.ablations.retention import Skills, skills_in
from lorapar_ray.boundary import damaged, read_object
from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.errors import UserError

RECUT = "remove this run's directory and run the same command again"
Matrix = tuple[tuple[float, ...], ...]
"""K × K accuracies R[k][j], in the order of training."""


@dataclass(frozen=True)
class Course:
    """One finished run."""

    seed: int
    systems: tuple[int, ...]
    """In the order of training."""
    skills: Matrix

    @property
    def backward_transfer(self) -> float:
        """Mean change of the earlier Systems' skills since their own training."""
        last = self.skills[-1]
        changes = [last[system] - own[system] for system, own in enumerate(self.skills[:-1])]
        return sum(changes) / len(changes)

    @property
    def reached(self) -> float:
        """Mean skill of a System right after its own training."""
        return sum(row[system] for system, row in enumerate(self.skills)) / len(self.skills)

    @property
    def kept(self) -> float:
        """Mean skill at the end."""
        return sum(self.skills[-1]) / len(self.skills)


@dataclass(frozen=True)
class Regions:
    """What each System of a run trains."""

    theta: float
    shares: tuple[float, ...]
    """Of all elements, each System's."""
    overlap: dict[str, tuple[float, ...]]
    """Of each two Systems, such as "1-2", the Jaccard index of what θ keeps. If there is a control, three more: of
    halves of the two, of two halves of the first, and of two of the second."""


@dataclass(frozen=True)
class Forgetting:
    """The verdict on a claim."""

    claim: Claim
    found: Found
    difference: float
    """Difference of the backward transfers; above 0: the better arm forgets less."""
    interval: tuple[float, float] | None
    """95 %, over seeds (Student's t); None: fewer than three."""
    sentence: str


def require_skills(config: Config) -> None:
    """Check that the skill of every System can be measured.

    Raises:
        UserError: a System of `sft.systems` has no entry in `data.test`.
    """
    tested = {source.system for source in config.data.test}
    if without := [system for system in config.sft.systems if system not in tested]:
        raise UserError(
            f"data.test: no entry has system {without[0]}, so its skill cannot be measured; give each entry one"
        )


def read_skills(folder: Path, name: str) -> Skills | None:
    """One model's accuracy on each System's test rows; None if it has not been evaluated."""
    if not (folder / "eval" / f"{name}.json").is_file():
        return None
    rows = read_table(folder / "data" / "test.parquet", {"id": str})
    systems = {row["id"]: row["system"] for row in rows if row.get("system") is not None}
    return skills_in(folder / "eval" / f"{name}.parquet", systems, by="id")


def read_course(folder: Path, config: Config) -> Course | None:
    """A run's skills; None if it has not been evaluated, or a System has no test row left."""
    found = [read_skills(folder, name) for name in config.trained]
    systems = tuple(config.sft.systems)
    if any(each is None or not set(systems) <= each.keys() for each in found):
        return None
    return Course(config.seed, systems, tuple(tuple(each[j] for j in systems) for each in found if each is not None))


def read_regions(folder: Path) -> Regions | None:
    """The regions of a run; None if it has not cut any.

    Raises:
        UserError: their summary is damaged.
    """
    file = folder / "partition" / "systems.json"
    if not file.is_file():
        return None
    found = read_object(file, RECUT)
    with damaged(file, RECUT):
        overlap: dict[str, tuple[float, ...]] = {pair: (float(value),) for pair, value in found["jaccard"].items()}
        for pair, control in found.get("control", {}).items():
            overlap[pair] += tuple(float(control["jaccard"][name]) for name in ("across", "system1", "system2"))
        shares = tuple(float(each["share"]) for each in found["systems"].values())
        return Regions(float(found["theta"]), shares, overlap)


def mean_skills(courses: Sequence[Course]) -> Matrix:
    """The mean over seeds."""
    size = range(len(courses[0].systems))
    return tuple(tuple(sum(each.skills[k][j] for each in courses) / len(courses) for j in size) for k in size)


def compare(claim: Claim, arms: Mapping[str, Sequence[Course]]) -> Forgetting | None:
    """Whether one arm forgets less than another; None if they have no seed in common."""
    theirs = {each.seed: each for each in arms.get(claim.worse, ())}
    pairs = [(each, theirs[each.seed]) for each in arms.get(claim.better, ()) if each.seed in theirs]
    if not pairs:
        return None
    difference, interval, found = over_seeds([a.backward_transfer - b.backward_transfer for a, b in pairs])
    return Forgetting(claim, found, difference, interval, _sentence(claim, found, pairs, interval))


def _sentence(
    claim: Claim, found: Found, pairs: Sequence[tuple[Course, Course]], interval: tuple[float, float] | None
) -> str:
    better, worse = (list(side) for side in zip(*pairs, strict=True))
    lost = [-100 * sum(each.backward_transfer for each in side) / len(side) for side in (better, worse)]
    reached = [sum(each.reached for each in side) / len(side) for side in (better, worse)]
    seeds = f"{len(pairs)} seeds" if len(pairs) > 1 else "one seed"
    return (
        f"{sentence(claim.text)}: over {seeds}, {claim.better} lost {lost[0]:.1f} and {claim.worse} "
        f"{lost[1]:.1f} points of the earlier Systems' skills (difference {lost[1] - lost[0]:+.1f}; "
        f"{shown_interval(interval)}), {ENDINGS[found]} Right after its own training a System reached {reached[0]:.1%} "
        f"and {reached[1]:.1%}."
    )


def markdown(
    arms: Mapping[str, Sequence[Course]],
    regions: Mapping[str, Regions | None],
    base: Skills | None,
    verdicts: Sequence[Forgetting],
) -> str:
    """A table of the arms, each one's matrix (mean over seeds), and a line for each claim.

    Args:
        regions: by arm, what `read_regions` found.
    """
    head = ("arm", "backward transfer", "95 % interval", "reached", "at the end", "each System trains", "seeds")
    text = [_line(head), _line(["---"] * len(head))]
    text += [_line([arm, *_summary(courses, regions.get(arm))]) for arm, courses in arms.items()]
    for arm, courses in arms.items():
        systems = courses[0].systems
        text += ["", f"Accuracy of {arm}, means over seeds:", ""]
        text += [_line(["after", *(f"System {system}" for system in systems)]), _line(["---"] * (1 + len(systems)))]
        if base is not None:
            text.append(_line(["nothing", *(f"{base[system]:.1%}" if system in base else "–" for system in systems)]))
        for system, row in zip(systems, mean_skills(courses), strict=True):
            text.append(_line([f"System {system}", *(f"{each:.1%}" for each in row)]))
    text += _overlap(regions)
    if verdicts:
        text += ["", *(f"- **{each.found}**: {each.sentence}" for each in verdicts)]
    return "\n".join(text) + "\n"


def _summary(courses: Sequence[Course], regions: Regions | None) -> list[str]:
    transfers, n = [each.backward_transfer for each in courses], len(courses)
    interval = mean_interval(transfers)[1] if n >= 3 else None
    return [
        f"{100 * sum(transfers) / n:+.1f} points",
        "–" if interval is None else f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}",
        f"{sum(each.reached for each in courses) / n:.1%}",
        f"{sum(each.kept for each in courses) / n:.1%}",
        "–" if regions is None else ", ".join(f"{share:.1%}" for share in regions.shares),
        str(n),
    ]


def _overlap(regions: Mapping[str, Regions | None]) -> list[str]:
    """How far what θ keeps for each two Systems overlaps, in the first arm that leaves something out."""
    arm, found = next(((arm, each) for arm, each in regions.items() if each and each.theta < 1), ("", None))
    if found is None:
        return []
    head = ("Systems", "overlap", "half of one and half of the other", "two halves of the first", "of the second")
    text = ["", f"Overlap (Jaccard index) of what θ = {found.theta:g} keeps, in the first run of {arm}. The halves are"]
    text += ["random halves of a System's scored examples.", "", _line(head), _line(["---"] * len(head))]
    for pair, values in found.overlap.items():
        cells = [f"{value:.3f}" for value in values] + ["–"] * (4 - len(values))
        text.append(_line([pair.replace("-", " and "), *cells]))
    return text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def comma_separated(arms: Mapping[str, Sequence[Course]]) -> str:
    """Every accuracy: arm, seed, the System trained last, the System tested."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("arm", "seed", "after_system", "system", "accuracy"))
    for arm, courses in arms.items():
        for each in courses:
            for after, row in zip(each.systems, each.skills, strict=True):
                writer.writerows((arm, each.seed, after, j, value) for j, value in zip(each.systems, row, strict=True))
    return out.getvalue()
