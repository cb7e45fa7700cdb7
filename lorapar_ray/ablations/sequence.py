"""What training on further Systems costs the earlier ones: skills after every System of a sequence.

R[k][j] is the accuracy on System j's test rows after training on System k, in the order of training. *Backward
transfer* is the mean of R[K][j] − R[j][j] over all Systems j but the last (Lopez-Paz and Ranzato, Gradient Episodic
Memory, arXiv 1706.08840, section 2): below 0, what was forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorapar_ray.ablations.grid import Claim, sentence
from lorapar_ray.ablations.retention import Answers, answers_in, share_right
from lorapar_ray.ablations.sizes import RECUT
from lorapar_ray.ablations.tables import Said, Table, bullets
from lorapar_ray.ablations.verdicts import (
    NO_SEED,
    Effect,
    Found,
    Uncompared,
    effect,
    ending,
    left_out,
    shown,
    too_little_to_lose,
    with_as_much_to_lose,
)
from lorapar_ray.boundary import damaged, read_object
from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.errors import UserError

Matrix = tuple[tuple[float, ...], ...]
"""K × K accuracies R[k][j], in the order of training."""


@dataclass(frozen=True)
class Course:
    """One finished run."""

    seed: int
    systems: tuple[int, ...]
    """In the order of training."""
    right: tuple[Answers, ...]
    """The answers after each of them."""

    @cached_property
    def skills(self) -> Matrix:
        """Accuracies."""
        return tuple(tuple(share_right(after[system]) for system in self.systems) for after in self.right)

    @cached_property
    def changes(self) -> list[dict[str, int]]:
        """Of each System but the last, by question: 1, 0 or −1 since its own training."""
        return [
            {question: self.right[-1][system][question] - right for question, right in after[system].items()}
            for system, after in zip(self.systems[:-1], self.right, strict=False)
        ]

    @property
    def backward_transfer(self) -> float:
        """Mean change of the earlier Systems' skills since their own training."""
        return sum(sum(each.values()) / len(each) for each in self.changes) / len(self.changes)

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
    effect: Effect
    """Difference of the backward transfers; above 0: the better arm forgets less."""
    starts: Effect
    """How much more the better arm had of the earlier Systems' skills, each right after its own training."""
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


def read_answers(folder: Path, name: str) -> Answers | None:
    """One model's answers to each System's test rows; None if it has not been evaluated."""
    if not (folder / "eval" / f"{name}.json").is_file():
        return None
    rows = read_table(folder / "data" / "test.parquet", {"id": str})
    systems = {row["id"]: row["system"] for row in rows if row.get("system") is not None}
    return answers_in(folder / "eval" / f"{name}.parquet", systems, by="id")


def read_course(folder: Path, config: Config) -> Course | None:
    """A run's skills; None if it has not been evaluated, or a System has no test row left."""
    found = [read_answers(folder, name) for name in config.trained]
    systems = tuple(config.sft.systems)
    if any(each is None or not set(systems) <= each.keys() for each in found):
        return None
    return Course(config.seed, systems, tuple(each for each in found if each is not None))


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


def compare(
    claim: Claim, arms: Mapping[str, Sequence[Course]], seeds: Sequence[int] = (), comparisons: int = 1
) -> Forgetting | Uncompared:
    """Whether one arm forgets less than another.

    An arm that learnt less has less to forget: a claim is decided only if the arm that forgot less is shown to have had
    as much to lose.

    Args:
        seeds: the planned ones, of which the sentence names those without results.
        comparisons: see `effect`.
    """
    theirs = {each.seed: each for each in arms.get(claim.worse, ())}
    pairs = [(each, theirs[each.seed]) for each in arms.get(claim.better, ()) if each.seed in theirs]
    if not pairs:
        return Uncompared(claim, NO_SEED)
    better, worse = (list(side) for side in zip(*pairs, strict=True))
    lost, starts = difference_of(better, worse, comparisons), _starts(better, worse, comparisons)
    found = with_as_much_to_lose(lost.found(), starts)
    words = _sentence(claim, found, lost, starts, better, worse)
    return Forgetting(claim, found, lost, starts, words + left_out(seeds, [each.seed for each in better]))


def _starts(arm: Sequence[Course], other: Sequence[Course], comparisons: int) -> Effect:
    """An arm's skills of the earlier Systems, each right after its own training, less another arm's."""
    by_seed, groups = [0.0] * len(arm), []
    earlier = len(arm[0].systems) - 1
    for place, system in enumerate(arm[0].systems[:-1]):
        found: dict[str, float] = {}
        for number, pair in enumerate(zip(arm, other, strict=True)):
            for sign, each in zip((1, -1), pair, strict=True):
                right = each.right[place][system]
                by_seed[number] += sign * share_right(right) / earlier
                for question, correct in right.items():
                    found[question] = found.get(question, 0.0) + sign * correct / len(arm) / earlier
        groups.append(list(found.values()))
    return effect(by_seed, groups, comparisons=comparisons)


def difference_of(arm: Sequence[Course], other: Sequence[Course] = (), comparisons: int = 1) -> Effect:
    """The backward transfer of an arm, less that of another one with the same seeds in the same order."""
    signed = [(1, each) for each in arm] + [(-1, each) for each in other]
    by_seed = [each.backward_transfer for each in arm]
    if other:
        by_seed = [own - less.backward_transfer for own, less in zip(by_seed, other, strict=True)]
    groups = []
    for place in range(len(arm[0].changes)):
        found: dict[str, float] = {}
        for sign, each in signed:
            own = each.changes[place]
            for question, change in own.items():
                found[question] = found.get(question, 0.0) + sign * change / len(arm) / len(each.changes)
        groups.append(list(found.values()))
    return effect(by_seed, groups, largest=2 if other else 1, comparisons=comparisons)


def _sentence(
    claim: Claim, found: Found, difference: Effect, starts: Effect, better: Sequence[Course], worse: Sequence[Course]
) -> str:
    lost = [-100 * sum(each.backward_transfer for each in side) / len(side) for side in (better, worse)]
    reached = [sum(each.reached for each in side) / len(side) for side in (better, worse)]
    end = ending(difference, found)
    if difference.found() != found:
        more = f"{100 * starts.difference:+.1f} points more of them"
        had = f"right after their own training {claim.better} had {more} than {claim.worse}"
        end = too_little_to_lose(claim, difference, starts, had)
    return (
        f"{sentence(claim.text)}: {claim.better} lost {lost[0]:.1f} and {claim.worse} {lost[1]:.1f} points of the "
        f"earlier Systems' skills (difference {lost[1] - lost[0]:+.1f}; {shown(difference)}), {end} Right after its "
        f"own training a System reached {reached[0]:.1%} and {reached[1]:.1%}."
    )


def tables(
    arms: Mapping[str, Sequence[Course]], regions: Mapping[str, Regions | None], base: Answers | None
) -> list[Table]:
    """A table of the arms, each one's matrix (mean over seeds), and the overlap of their regions.

    Args:
        regions: by arm, what `read_regions` found.
    """
    head: tuple[str, ...] = ("arm", "backward transfer", "95 % interval", "reached", "at the end")
    head = (*head, "each System trains", "seeds")
    rows = [(arm, *_summary(courses, regions.get(arm))) for arm, courses in arms.items()]
    found = [Table("systems", head, rows, "Systems one after the other: skills reached, kept and lost")]
    for arm, courses in arms.items():
        systems = courses[0].systems
        rows = [
            (f"System {system}", *map(_percent, row)) for system, row in zip(systems, mean_skills(courses), strict=True)
        ]
        if base is not None:
            untrained = (_percent(share_right(base[system])) if system in base else "–" for system in systems)
            rows.insert(0, ("nothing", *untrained))
        head = ("after", *(f"System {system}" for system in systems))
        found.append(Table("skills", head, rows, f"Accuracy of {arm}, means over seeds"))
    return found + _overlap(regions)


def markdown(found: Sequence[Table], verdicts: Sequence[Said]) -> str:
    """The tables below each other, and a line for each claim."""
    first, *others = found
    parts = [first.markdown(), *(part for each in others for part in (f"{each.title}:\n", each.markdown()))]
    return "\n".join(parts + (["\n".join(bullets(verdicts)) + "\n"] if verdicts else []))


def latex(found: Sequence[Table]) -> str:
    """The tables below each other, each below its title as a comment."""
    return "\n".join(f"% {each.title}\n{each.latex()}" for each in found)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _summary(courses: Sequence[Course], regions: Regions | None) -> list[str]:
    transfer, n = difference_of(courses), len(courses)
    low, high = transfer.interval
    return [
        f"{100 * transfer.difference:+.1f} points",
        f"{100 * low:+.1f} to {100 * high:+.1f}",
        f"{sum(each.reached for each in courses) / n:.1%}",
        f"{sum(each.kept for each in courses) / n:.1%}",
        "–" if regions is None else ", ".join(f"{share:.1%}" for share in regions.shares),
        str(n),
    ]


def _overlap(regions: Mapping[str, Regions | None]) -> list[Table]:
    """How far what θ keeps for each two Systems overlaps, in the first arm that leaves something out."""
    arm, found = next(((arm, each) for arm, each in regions.items() if each and each.theta < 1), ("", None))
    if found is None:
        return []
    head = ("Systems", "overlap", "half of one and half of the other", "two halves of the first", "of the second")
    title = (
        f"Overlap (Jaccard index) of what θ = {found.theta:g} keeps, in the first run of {arm}; the halves are random "
        "halves of a System's scored examples"
    )
    rows = [
        (pair.replace("-", " and "), *(f"{value:.3f}" for value in values), *["–"] * (4 - len(values)))
        for pair, values in found.overlap.items()
    ]
    return [Table("overlap", head, rows, title)]


def comma_separated(arms: Mapping[str, Sequence[Course]]) -> str:
    """Every accuracy: arm, seed, the System trained last, the System tested."""
    rows = [
        (arm, *map(str, (each.seed, after, system, value)))
        for arm, courses in arms.items()
        for each in courses
        for after, row in zip(each.systems, each.skills, strict=True)
        for system, value in zip(each.systems, row, strict=True)
    ]
    return Table("systems", ("arm", "seed", "after_system", "system", "accuracy"), rows).comma_separated()
