"""Scores of the halves of each System's examples, at growing numbers of examples, for the signal-or-noise control (see
`lorapar_ray.partition.control`).

    scores/halves/00.safetensors …     float32, keys `1a.<adapter key>`, `1b.…`, `2a.…`, `2b.…`; metadata: examples

With more than two Systems there is one file, of all their examples.
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
REPAIR = "run `lorapar score` with --redo score"


@dataclass(frozen=True)
class Halves:
    """Scores of two random halves of each System's examples."""

    examples: tuple[int, ...]
    """Number of examples of each System, both halves together."""
    scores: tuple[Mapping[str, Tensor], ...]
    """Two of each System, one System after the other."""

    @classmethod
    def of(cls, sums: Sequence[GradSums | None], score: Scoring) -> Halves:
        """From the sums of each half."""
        found = [half for half in sums if half is not None]
        examples = (one.n + other.n for one, other in zip(found[::2], found[1::2], strict=True))
        return cls(tuple(examples), tuple(score(half, number) for number, half in enumerate(found)))


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
        yield Halves.of(halves, score)


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
        yield Halves.of(halves, score)


def save_halves(folder: Path, points: Iterable[Halves]) -> None:
    """Write the halves; the folder appears as a whole."""
    with atomic_path(folder) as draft:
        draft.mkdir(parents=True)
        for number, point in enumerate(points):
            tensors = {
                f"{name}.{key}": value.float().contiguous()
                for name, scores in zip(_names(len(point.examples)), point.scores, strict=True)
                for key, value in scores.items()
            }
            save_file(tensors, draft / f"{number:02d}.safetensors", metadata={"examples": json.dumps(point.examples)})


def load_halves(folder: Path) -> Iterator[Halves]:
    """Read what `save_halves` wrote, one point at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors, metadata = read_tensors_and_metadata(file, REPAIR)
        with damaged(file, REPAIR):
            examples = tuple(int(count) for count in json.loads(metadata["examples"]))
        scores = (
            {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            for name in _names(len(examples))
        )
        yield Halves(examples, tuple(scores))


def _names(systems: int) -> list[str]:
    return [f"{system}{half}" for system in range(1, systems + 1) for half in "ab"]


def _added(total: GradSums | None, more: GradSums) -> GradSums:
    if total is None:
        return more
    total.add(more)
    return total
