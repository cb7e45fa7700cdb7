"""What a machine runs out of, disk or memory, in the middle of a stage: one line, and the same command goes on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_interruption import copy_before
from tests.e2e.twin import ends_as_its_twin
from tests.tiny_run import lorapar

pytestmark = pytest.mark.e2e
ROOM_KIB = {"score": 150, "sft": 60, "grpo": 60, "evaluate": 16}
"""Free at a stage's beginning: for its first files and not for its last."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk of its own can be made here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def resize(disk: Path, free_kib: int) -> None:
    used = sum(file.stat().st_blocks * 512 for file in disk.rglob("*")) // 1024
    subprocess.run(["mount", "-o", f"remount,size={used + free_kib}k", disk], check=True)


def full_disk(stage: str, chance: Random, recovery: Recovery, finished: FinishedRun, disk: Path) -> None:
    run = copy_before(finished, stage, disk / "run")
    resize(disk, chance.randint(ROOM_KIB[stage] // 2, ROOM_KIB[stage]))
    ended = lorapar(stage, "-c", finished.config, "-d", run)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert len(ended.stderr.splitlines()) == 1 and "no space left on the disk of" in ended.stderr, ended.stderr
    resize(disk, 64 * 1024)
    with recovery(stage, "full disk"):
        again = lorapar(stage, "-c", finished.config, "-d", run)
    assert again.returncode == 0, again.stderr
    ends_as_its_twin(stage, run, finished.run)


@pytest.mark.chaos("score", "full disk")
def test_scoring_on_a_full_disk(chance: Random, recovery: Recovery, finished: FinishedRun, disk: Path) -> None:
    full_disk("score", chance, recovery, finished, disk)


@pytest.mark.chaos("sft", "full disk")
def test_stage_1_on_a_full_disk(chance: Random, recovery: Recovery, finished: FinishedRun, disk: Path) -> None:
    full_disk("sft", chance, recovery, finished, disk)


@pytest.mark.chaos("grpo", "full disk")
def test_stage_2_on_a_full_disk(chance: Random, recovery: Recovery, finished: FinishedRun, disk: Path) -> None:
    full_disk("grpo", chance, recovery, finished, disk)


@pytest.mark.chaos("evaluate", "full disk")
def test_evaluation_on_a_full_disk(chance: Random, recovery: Recovery, finished: FinishedRun, disk: Path) -> None:
    full_disk("evaluate", chance, recovery, finished, disk)


@pytest.mark.chaos("sft", "out of memory")
def test_stage_1_without_memory(chaos_round: int, recovery: Recovery, finished: FinishedRun, tmp_path: Path) -> None:
    """Ray's own monitor kills a worker wherever more than a thousandth of the machine's memory is in use."""
    run = copy_before(finished, "sft", tmp_path / "run")
    arguments = ("sft", "-c", finished.config, "-d", run)
    ended = lorapar(*arguments, RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="100")
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "sft: the machine ran out of memory" in ended.stderr.splitlines()[-1], ended.stderr
    with recovery("sft", "out of memory"):
        again = lorapar(*arguments)
    assert again.returncode == 0, again.stderr
    ends_as_its_twin("sft", run, finished.run)
