"""Scores of the halves of each System's examples, at growing numbers of examples, for the signal-or-noise control (see
`lorapar_ray.partition.control`).

    scores/halves/00.safetensors …     float32, keys `1a.<adapter key>`, `1b.…`, `2a.…`, `2b.…`; metadata: examples

They are part of the result of `score`, so that the control of another θ also works after `work/` is deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from itertools import product, takewhile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lorapar_ray.boundary import damaged, read_tensors_and_metadata
from lorapar_ray.files import atomic_path
from lorapar_ray.importance.parts import Plan, sums_of
from lorapar_ray.importance.sums import GradSums

Scoring = Callable[[GradSums, int], Mapping[str, Tensor]]
NAMES = ("1a", "1b", "2a", "2b")
REPAIR = "run `lorapar score` with --redo score"


@dataclass(frozen=True)
class Halves:
    """Scores of two random halves of each System's examples."""

    examples: tuple[int, int]
    """Numbers of examples of System 1 and of System 2, both halves together."""
    scores: tuple[Mapping[str, Tensor], ...]
    """Four, in the order of `NAMES`."""


def half_scores(units1: Sequence[Path], units2: Sequence[Path], score: Scoring) -> Iterator[Halves]:
    """Halves of the first 2, 4, 8 … and at last all units of each System's partial sums.

    Args:
        units1, units2: saved `GradSums` of each System; every second one belongs to the second half.
        score: from a half's sums and its number (0 to 3) to its scores.

    Yields:
        nothing where a System has fewer than two units.
    """
    units, most = (units1, units2), max(len(units1), len(units2))
    if min(len(units1), len(units2)) < 2:
        return
    halves: list[GradSums | None] = [None] * 4
    taken = 0
    for count in [*takewhile(lambda n: n < most, (2**power for power in count_from(1))), most]:
        for system, files in enumerate(units):
            for index, file in enumerate(files[taken:count], start=taken):
                halves[2 * system + index % 2] = _added(halves[2 * system + index % 2], GradSums.load(file))
        taken = count
        sums = [half for half in halves if half is not None]
        yield Halves(
            (sums[0].n + sums[1].n, sums[2].n + sums[3].n),
            tuple(score(half, number) for number, half in enumerate(sums)),
        )


def halves_of_parts(folder: Path, plan: Plan, score: Scoring) -> Iterator[Halves]:
    """Halves of the first 2, 4, 8 … and at last all units of each System, from the running sums in `folder`.

    Yields:
        nothing where a System has fewer than two units.
    """
    systems = sorted(plan.examples)
    if min(plan.units(system) for system in systems) < 2:
        return
    parts = [part for part, _ in plan.parts()]
    halves: list[GradSums | None] = [None] * (2 * len(systems))
    for level in range(max(part.level for part in parts) + 1):
        for number, (system, half) in enumerate(product(systems, (0, 1))):
            more = sums_of(
                folder, [part for part in parts if (part.system, part.level, part.half) == (system, level, half)]
            )
            if more is not None:
                halves[number] = _added(halves[number], more)
        sums = [half for half in halves if half is not None]
        yield Halves(
            (sums[0].n + sums[1].n, sums[2].n + sums[3].n),
            tuple(score(half, number) for number, half in enumerate(sums)),
        )


def save_halves(folder: Path, points: Iterable[Halves]) -> None:
    """Write the halves; the folder appears as a whole."""
    with atomic_path(folder) as draft:
        draft.mkdir(parents=True)
        for number, point in enumerate(points):
            tensors = {
                f"{name}.{key}": value.float().contiguous()
                for name, scores in zip(NAMES, point.scores, strict=True)
                for key, value in scores.items()
            }
            save_file(tensors, draft / f"{number:02d}.safetensors", metadata={"examples": json.dumps(point.examples)})


def load_halves(folder: Path) -> Iterator[Halves]:
    """Read what `save_halves` wrote, one point at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors, metadata = read_tensors_and_metadata(file, REPAIR)
        with damaged(file, REPAIR):
            first, second = json.loads(metadata["examples"])
        scores = (
            {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            for name in NAMES
        )
        yield Halves((int(first), int(second)), tuple(scores))


def _added(total: GradSums | None, more: GradSums) -> GradSums:
    if total is None:
        return more
    total.add(more)
    return total
