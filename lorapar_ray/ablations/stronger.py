"""Does RL that starts from a stronger SFT stage end higher? Accuracies after both stages.

Two arms differ in how much their first stage trains. The claim is about them only if the first stage of the one is
shown to be the better one; then it is decided by the accuracies at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorapar_ray.ablations.grid import Claim, sentence
from lorapar_ray.ablations.results import Outcome, Verdict, decide
from lorapar_ray.ablations.tables import Numbers, Said, Table, bullets
from lorapar_ray.ablations.verdicts import ENDINGS, NO_SEED, Found, Uncompared, ending, left_out, shown

By = Mapping[str, Sequence[Outcome]]
"""Outcomes after one stage, by arm."""


@dataclass(frozen=True)
class Stronger:
    """The verdict on a claim."""

    claim: Claim
    found: Found
    first: Verdict
    """On the accuracies after the first stage."""
    last: Verdict
    """On those at the end."""
    left_out: str = ""
    """A sentence on seeds without results."""

    @property
    def sentence(self) -> str:
        """It in words."""
        steps = [
            f"{100 * each.effect.difference:+.1f} points ({each.reached[0]:.1%} and {each.reached[1]:.1%}; "
            f"{shown(each.effect)})"
            for each in (self.first, self.last)
        ]
        named = f"{self.claim.better} is {steps[0]} above {self.claim.worse} after the first stage"
        end = ending(self.last.effect, self.found)
        if self.last.found != self.found:
            end = f"but its first stage is not shown to be the stronger one, {ENDINGS[self.found]}."
        return f"{sentence(self.claim.text)}: {named} and {steps[1]} at the end, {end}{self.left_out}"


def compare(
    claim: Claim, first: By, last: By, seeds: Sequence[int] = (), comparisons: int = 1
) -> Stronger | Uncompared:
    """The verdict on a claim about two arms.

    Args:
        seeds: the planned ones, of which the sentence names those without results.
        comparisons: see `effect`.
    """
    before, after = (
        decide(claim, each.get(claim.better, ()), each.get(claim.worse, ()), comparisons=comparisons)
        for each in (first, last)
    )
    if isinstance(before, Uncompared) or isinstance(after, Uncompared):
        return Uncompared(claim, NO_SEED)
    verdict = after.found if before.found == "held" else "undecided"
    compared = {each.seed for each in last[claim.better]} & {each.seed for each in last[claim.worse]}
    return Stronger(claim, verdict, before, after, left_out(seeds, compared))


def table(stages: Sequence[str], outcomes: Sequence[By], verdicts: Sequence[Said]) -> Table:
    """Each arm's accuracy after each stage, means over seeds, and a line for each verdict.

    Arms without an accuracy after one of the stages are left out.
    """
    arms = [arm for arm in outcomes[-1] if all(arm in each for each in outcomes)]
    reached = {arm: [_mean(each[arm]) for each in outcomes] for arm in arms}
    rows = [(arm, *(f"{each:.1%}" for each in means), str(len(outcomes[-1][arm]))) for arm, means in reached.items()]
    head = ("arm", *(f"after {stage}" for stage in stages), "seeds")
    numbers: list[Numbers] = [
        dict(zip(head, (arm, *means, len(outcomes[-1][arm])), strict=True)) for arm, means in reached.items()
    ]
    return Table("stages", head, rows, "Accuracy after each stage", bullets(verdicts), numbers)


def _mean(outcomes: Sequence[Outcome]) -> float:
    return sum(sum(each.right.values()) / len(each.right) for each in outcomes) / len(outcomes)
