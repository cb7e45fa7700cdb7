"""The disk of the run directory is slow, and for some time hangs, while a run works: no time is up and no lock free."""

import subprocess
import time
from pathlib import Path
from random import Random

import pytest

from lorapar_ray.errors import UserError
from lorapar_ray.run_lock import SILENT_S, run_lock
from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.disturbed import ends_undisturbed

pytestmark = pytest.mark.e2e
CALL_MS = 10
HANGS_S = (SILENT_S / 3, SILENT_S * 2 / 3)
"""So long that the lock's holder misses many beats."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fault injection; see its source."""
    made = tmp_path_factory.mktemp("slow") / "slow_disk.so"
    source = Path(__file__).with_name("slow_disk.c")
    built = subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-o", made, source, "-ldl"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return made


def newest(run: Path) -> int:
    return max(file.lstat().st_mtime_ns for file in run.rglob("*"))


@pytest.mark.chaos("label", "slow disk")
@pytest.mark.chaos("score", "slow disk")
@pytest.mark.chaos("sft", "slow disk")
@pytest.mark.chaos("grpo", "slow disk")
@pytest.mark.chaos("evaluate", "slow disk")
def test_a_disk_that_hangs(
    chance: Random, recovery: Recovery, finished: FinishedRun, library: Path, tmp_path: Path
) -> None:
    run, hangs = tmp_path / "run", tmp_path / "hangs"
    disk = {
        "LD_PRELOAD": str(library),
        "SLOW_DISK_ROOT": str(run),
        "SLOW_DISK_MS": str(CALL_MS),
        "SLOW_DISK_HANGS": str(hangs),
    }

    def hang(stage: str) -> str:
        seconds = chance.uniform(*HANGS_S)
        hangs.touch()
        time.sleep(seconds / 2)
        before = newest(run)
        time.sleep(seconds / 2)
        assert newest(run) == before, "the disk did not hang"
        with pytest.raises(UserError, match="in use by process"), run_lock(run):
            pass
        hangs.unlink()
        return f"hangs for {seconds:.0f} s"

    ends_undisturbed(finished, run, disk, "slow disk", hang, chance, recovery)
