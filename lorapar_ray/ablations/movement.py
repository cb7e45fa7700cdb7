"""Does a mask hold the elements that training moves where nothing is masked?

For each seed, the elements that moved most in an unmasked run, as many as the mask keeps, are compared with the mask
(see `lorapar_ray.partition.movement`), with a random mask of that size, and with how far the masks of two random halves
of the scored examples agree: a mask as noisy as those cannot agree better with anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorapar_ray.ablations.grid import Claim, sentence
from lorapar_ray.ablations.sizes import RECUT
from lorapar_ray.ablations.tables import Numbers, Said, Table, bullets
from lorapar_ray.ablations.verdicts import (
    FEWEST_SEEDS,
    MARGIN,
    NO_SEED,
    Effect,
    Found,
    Uncompared,
    decided_by,
    effect,
    ending,
    left_out,
)
from lorapar_ray.boundary import damaged, read_object
from lorapar_ray.runs import RunDirectory

if TYPE_CHECKING:
    from lorapar_ray.partition.movement import Movement


@dataclass(frozen=True)
class Overlap:
    """One unmasked run against the mask of the run with the same seed."""

    seed: int
    movement: Movement
    halves: float | None
    """Jaccard index of the masks of two random halves of System 1's examples; None without a control."""


@dataclass(frozen=True)
class Held:
    """The verdict on a claim."""

    claim: Claim
    found: Found
    effect: Effect
    """Jaccard index with the mask less that with a random one."""
    sentence: str


def read_overlap(masked: Path, unmasked: Path, seed: int) -> Overlap | None:
    """The overlap of two finished runs of stage 1; None if the trained adapter has another shape than the one that was
    scored (that of PiSSA and OLoRA is exported as a plain LoRA of twice the rank).

    Raises:
        UserError: a file of the two runs is missing or damaged.
    """
    from lorapar_ray.adapters import read_adapter_state
    from lorapar_ray.partition.movement import movement
    from lorapar_ray.partition.regions import load_regions, stage_mask

    run, other = RunDirectory(masked), RunDirectory(unmasked)
    before, after = (read_adapter_state(folder) for folder in (other.adapter, other.trained("sft") / "adapter"))
    mask = stage_mask(load_regions(run.partition / "regions.safetensors")[0], 1)
    shapes = [{key: tuple(tensor.shape) for key, tensor in each.items()} for each in (before, after, mask)]
    if not shapes[0] == shapes[1] == shapes[2]:
        return None
    return Overlap(seed, movement(before, after, mask, seed), _halves(run.partition / "summary.json"))


def _halves(file: Path) -> float | None:
    control = read_object(file, RECUT).get("control") if file.is_file() else None
    with damaged(file, RECUT):
        return float(control[-1]["jaccard"]["system1"]) if control else None


def decide(
    claim: Claim, overlaps: Sequence[Overlap], seeds: Sequence[int] = (), comparisons: int = 1
) -> Held | Uncompared:
    """Whether the mask holds more of what moved than a random one.

    Args:
        seeds: the planned ones, of which the sentence names those without an overlap.
        comparisons: see `effect`.
    """
    if not overlaps:
        return Uncompared(claim, f"{NO_SEED}, with adapters of one shape")
    difference = effect([each.movement.mask - each.movement.random for each in overlaps], comparisons=comparisons)
    found = difference.found()
    words = _sentence(claim, found, difference, overlaps) + left_out(seeds, [each.seed for each in overlaps])
    return Held(claim, found, difference, words)


def _sentence(claim: Claim, found: Found, difference: Effect, overlaps: Sequence[Overlap]) -> str:
    n = len(overlaps)
    kept, mask, random = (
        sum(getattr(each.movement, name) for each in overlaps) / n for name in ("kept", "mask", "random")
    )
    halves = [each.halves for each in overlaps if each.halves is not None]
    noise = (
        f"; masks of two random halves of the scored examples agree by {sum(halves) / len(halves):.3f}"
        if halves
        else ""
    )
    low, high = difference.interval
    over = f", 95 % interval {low:+.3f} to {high:+.3f} over {n} seeds" if n >= FEWEST_SEEDS else ""
    over += decided_by(difference, 1, "+.3f")
    return (
        f"{sentence(claim.text)}: the {kept:.1%} of the elements that moved most in {claim.worse} have a Jaccard index "
        f"of {mask:.3f} with the mask of {claim.better} and {random:.3f} with a random one of its size (difference "
        f"{difference.difference:+.3f}{over}{noise}), {ending(difference, found, within=f'{MARGIN:g}')}"
    )


def table(arms: Mapping[str, Sequence[Overlap]], verdicts: Sequence[Said]) -> Table:
    """A row for each unmasked run, and a line for each claim.

    Args:
        arms: overlaps by unmasked arm.
    """
    head = (
        "arm",
        "seed",
        "the mask keeps",
        "moved at all",
        "overlap with the mask",
        "with a random mask",
        "two halves",
    )
    rows = [
        (
            arm,
            str(each.seed),
            f"{each.movement.kept:.1%}",
            f"{each.movement.moved:.1%}",
            f"{each.movement.mask:.3f}",
            f"{each.movement.random:.3f}",
            "–" if each.halves is None else f"{each.halves:.3f}",
        )
        for arm, overlaps in arms.items()
        for each in overlaps
    ]
    numbers: list[Numbers] = [
        dict(zip(head, (arm, each.seed, *_measured(each), each.halves), strict=True))
        for arm, overlaps in arms.items()
        for each in overlaps
    ]
    title = "The mask against what training moved (Jaccard index)"
    return Table("movement", head, rows, title, bullets(verdicts), numbers)


def _measured(overlap: Overlap) -> tuple[float, float, float, float]:
    found = overlap.movement
    return found.kept, found.moved, found.mask, found.random
