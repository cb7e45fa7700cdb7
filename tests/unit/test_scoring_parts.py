"""Running sums on disk contain every unit once, from any worker."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorapar_ray.errors import UserError
from lorapar_ray.importance import GradSums
from lorapar_ray.importance.halves import halves_of_parts, load_halves, save_halves
from lorapar_ray.importance.parts import (
    UNIT_SIZE,
    Part,
    PartWriter,
    Plan,
    done_units,
    finished,
    settled,
    sums_of,
)
from lorapar_ray.importance.worker import _share, windows

PLAN = Plan({1: 23, 2: 9}, unit_size=2)


def sums(units: list[int], system: int = 1) -> GradSums:
    """As if example k of a unit had the gradient 2^-k and nothing else."""
    examples = [each for unit in units for each in PLAN.of_unit(system, unit)]
    value = torch.tensor([sum(2.0**-each for each in examples)])
    return GradSums(len(examples), {"k": value}, {"k": value.square()})


def write(folder: Path, part: Part, units: list[int]) -> Path:
    writer = PartWriter(folder, part)
    writer.units = units
    writer.save(sums(units, part.system))
    return writer._file


def test_parts_hold_every_example_once_by_halves_and_powers_of_two() -> None:
    seen = {1: [], 2: []}
    for part, units in PLAN.parts():
        assert all(unit % 2 == part.half for unit in units)
        assert all(part.level == max(0, unit.bit_length() - 1) for unit in units)
        seen[part.system] += [each for unit in units for each in PLAN.of_unit(part.system, unit)]
    assert {system: sorted(examples) for system, examples in seen.items()} == {1: list(range(23)), 2: list(range(9))}
    assert Plan({1: 3}, unit_size=16).units(1) == 2


def test_workers_share_every_unit_once_and_skip_what_is_done(tmp_path: Path) -> None:
    everything = {(part, unit) for part, units in PLAN.parts() for unit in units}
    for world in (1, 2, 3, 7):
        shares = [
            (part, unit)
            for rank in range(world)
            for part, units in _share(PLAN, tmp_path, rank, world)
            for unit in units
        ]
        assert len(shares) == len(everything) and set(shares) == everything
    part = Part(1, 2, 0)
    write(tmp_path, part, [4])
    left = {(part, unit) for rank in range(3) for part, units in _share(PLAN, tmp_path, rank, 3) for unit in units}
    assert left == everything - {(part, 4)}


def test_a_share_does_not_depend_on_what_the_others_have_written_since(tmp_path: Path) -> None:
    before = list(_share(PLAN, tmp_path, 1, 3))
    for part, units in _share(PLAN, tmp_path, 0, 3):
        write(tmp_path, part, units)
    assert list(_share(PLAN, tmp_path, 1, 3)) == before


def test_sums_of_overlapping_files_count_a_unit_once(tmp_path: Path) -> None:
    part = Part(1, 2, 1)
    write(tmp_path, part, [5])
    write(tmp_path, part, [5, 7])
    assert len(finished(tmp_path, part)) == 1
    done = sorted(done_units(tmp_path, part))
    total = sums_of(tmp_path, [part])
    assert total is not None and total.n == sums(done).n and torch.equal(total.first["k"], sums(done).first["k"])


def test_halves_of_three_systems_hold_every_example_once(tmp_path: Path) -> None:
    plan = Plan({1: 23, 2: 9, 3: 5}, unit_size=2)
    for part, units in plan.parts():
        writer = PartWriter(tmp_path / "sums", part)
        writer.units = units
        examples = [each for unit in units for each in plan.of_unit(part.system, unit)]
        value = torch.tensor([sum(2.0**-each for each in examples)])
        writer.save(GradSums(len(examples), {"k": value}, {"k": value.square()}))
    points = list(halves_of_parts(tmp_path / "sums", plan, lambda sums, number: sums.first))
    assert [point.examples for point in points] == [(4, 4, 4), (8, 8, 5), (16, 9, 5), (23, 9, 5)]
    save_halves(tmp_path / "halves", points[-1:])
    (found,) = load_halves(tmp_path / "halves")
    assert found.examples == (23, 9, 5) and len(found.scores) == 6
    for system, (first, second) in enumerate(zip(found.scores[::2], found.scores[1::2], strict=True), start=1):
        assert float(first["k"] + second["k"]) == sum(2.0**-each for each in range(plan.examples[system]))


def test_a_damaged_file_is_done_anew(tmp_path: Path) -> None:
    part = Part(2, 0, 0)
    file = write(tmp_path, part, [0])
    file.write_bytes(file.read_bytes()[:20])
    assert done_units(tmp_path, part) == set() and sums_of(tmp_path, [part]) is None


def test_windows_keep_the_units_and_their_order() -> None:
    lengths = [10] * 23
    found = list(windows([0, 2, 4, 6, 8], PLAN, 1, lengths, 40))
    assert found == [[0, 2], [4, 6], [8]]


def test_sums_keep_the_units_that_they_were_begun_with(tmp_path: Path) -> None:
    new, earlier, keyed = (
        (lambda size, name=name: tmp_path / f"{name}-{size}") for name in ("new", "earlier", "keyed")
    )
    assert settled(new, 3) == (tmp_path / "new-16", 3)
    assert settled(new, 5) == (tmp_path / "new-16", 3)
    write(tmp_path / "earlier-16", Part(1, 0, 0), [0])
    assert settled(earlier, 5) == (tmp_path / "earlier-16", 16)  # as the key of an earlier version's sums says
    write(tmp_path / "keyed-8", Part(1, 0, 0), [0])
    for _ in range(2):
        folder, size = settled(keyed, 8)
        assert (folder, size) == (tmp_path / "keyed-8", 8) and done_units(folder, Part(1, 0, 0)) == {0}
    for damage in ("", "{}", '{"unit_size": 0}', '{"unit_size": "3"}'):
        (tmp_path / "new-16" / UNIT_SIZE).write_text(damage)
        with pytest.raises(UserError, match=r"unit_size.json.*begins anew"):
            settled(new, 3)


@pytest.mark.parametrize("units", ["3", '["a"]', "[true]", "{}", "null", "[" * 100_000, "", None])
def test_sums_of_units_that_are_none_do_not_count(tmp_path: Path, units: str | None) -> None:
    part = Part(1, 0, 0)
    file = tmp_path / part.name / "writer.safetensors"
    file.parent.mkdir()
    save_file({"a": torch.ones(1)}, file, metadata=None if units is None else {"units": units})
    assert finished(tmp_path, part) == {}
    file.write_bytes(file.read_bytes()[:-1])
    assert finished(tmp_path, part) == {}
