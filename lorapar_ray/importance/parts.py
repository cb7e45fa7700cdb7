"""Running sums of scoring on disk; no example is counted twice or lost, even if workers die.

The examples of a System are numbered in the order of its sample and cut into units. A *part* is a set of units that is
always summed together: those of one half (even or odd units) between two powers of two of their number. So a sample of
any size has a few parts, and the signal-or-noise control can take halves of its first 2, 4, 8 … units from them.

    work/score/sums-<key>/1-02-a/<writer>.safetensors     one worker's sums of part 2 (units 4 to 7), first half
    work/score/sums-<key>/unit_size.json                  examples per unit, as when scoring began

A file's metadata lists the units that are in its sums. Its writer regularly replaces it, atomically, by one with more
units; no other worker writes it. Workers share a plan's units by number, not by what remains, so no two writers of one
group have a unit in common. Units that an earlier group finished are listed and skipped. If two files still hold the
same unit (a worker thought dead was alive), one of them does not count and its units are computed again.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from lorapar_ray.boundary import damaged, open_tensors, read_object
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.importance.sums import GradSums

UNIT_SIZE = "unit_size.json"
KEYED = 16
"""The size in the key of every folder of sums: the default of earlier versions, which put theirs there and recorded
none."""


@dataclass(frozen=True, order=True)
class Part:
    """Units of one System that are summed together."""

    system: int
    level: int
    """0 for units 0 and 1, l for units 2^l to 2^(l+1) − 1."""
    half: int
    """0 or 1: even or odd units."""

    @property
    def name(self) -> str:
        return f"{self.system}-{self.level:02d}-{'ab'[self.half]}"


@dataclass(frozen=True)
class Plan:
    """Number of examples of each System, and of examples per unit."""

    examples: Mapping[int, int]
    unit_size: int

    def size(self, system: int) -> int:
        """Examples per unit: fewer if there would be less than two units, since the control compares two halves."""
        return min(self.unit_size, -(-self.examples[system] // 2))

    def units(self, system: int) -> int:
        return -(-self.examples[system] // self.size(system))

    def of_unit(self, system: int, unit: int) -> range:
        """The examples of a unit, by their number in the sample."""
        size = self.size(system)
        return range(unit * size, min((unit + 1) * size, self.examples[system]))

    def parts(self) -> Iterator[tuple[Part, list[int]]]:
        """Every part with its units, one System after the other."""
        for system in sorted(self.examples):
            found: dict[Part, list[int]] = {}
            for unit in range(self.units(system)):
                found.setdefault(Part(system, max(0, unit.bit_length() - 1), unit % 2), []).append(unit)
            yield from sorted(found.items())


def settled(folder_of: Callable[[int], Path], wanted: int) -> tuple[Path, int]:
    """(folder of the sums, examples per unit): as when they were begun; for new sums `wanted`, which is recorded.

    So sums that were begun are continued even if `score.unit_size` is now another.

    Args:
        folder_of: the folder by the size in its key: `KEYED`, or for sums that an earlier version began with `wanted`,
            that.

    Raises:
        UserError: the record is damaged.
    """
    folder, earlier = folder_of(KEYED), folder_of(wanted)
    record = folder / UNIT_SIZE
    if not record.is_file():
        if folder.is_dir():
            return folder, KEYED
        if earlier.is_dir():
            return earlier, wanted
        write_json(record, {"unit_size": wanted})
    fix = f"delete '{folder}' and run `lorapar score` again: it begins anew"
    found = read_object(record, fix)
    with damaged(record, fix):
        size = found["unit_size"]
        if type(size) is not int or size < 1:
            raise ValueError("no size of a unit")
    return folder, size


def finished(folder: Path, part: Part) -> dict[Path, list[int]]:
    """The valid files of a part, with the units in each, in the order of their first units."""
    found = [(file, _units_in(file)) for file in sorted((folder / part.name).glob("*.safetensors"))]
    taken: set[int] = set()
    counted: dict[Path, list[int]] = {}
    for file, units in sorted(found, key=lambda each: (each[1][:1], -len(each[1]))):
        if units and not taken & set(units):
            taken |= set(units)
            counted[file] = units
    return counted


def done_units(folder: Path, part: Part) -> set[int]:
    """The units of a part that some sums include."""
    return {unit for units in finished(folder, part).values() for unit in units}


def sums_of(folder: Path, parts: Iterable[Part]) -> GradSums | None:
    """The sums of some parts, file after file in the order of their first units; None if there are no files."""
    total: GradSums | None = None
    for part in parts:
        for file in finished(folder, part):
            more = GradSums.load(file)
            if total is None:
                total = more
            else:
                total.add(more)
    return total


class PartWriter:
    """One worker's sums of one part, regularly written to disk."""

    def __init__(self, folder: Path, part: Part) -> None:
        self._file = folder / part.name / f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}.safetensors"
        self.units: list[int] = []

    def save(self, sums: GradSums) -> None:
        """Replace the file by `sums`, which hold `self.units`."""
        sums.save(self._file, units=json.dumps(self.units))


def _units_in(file: Path) -> list[int]:
    """Empty for a damaged file: its units are computed again."""
    try:
        units = json.loads(open_tensors(file).metadata()["units"])
    except (UserError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return units if isinstance(units, list) and all(type(unit) is int for unit in units) else []
