"""A machine is out of memory for a moment in every stage: Ray kills processes; the run, or the same command begun
again, ends as its twin does."""

import subprocess
import time
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.disturbed import ends_undisturbed
from tests.e2e.test_interruption import title

pytestmark = pytest.mark.e2e
ENOUGH, SCARCE = 0.1, 0.97
"""Shares of the memory in use; Ray kills from 0.95 on."""
LIMIT_S = 60
"""Until Ray has killed something."""


class Memory:
    """Fault injection: what Ray reads of a machine's memory, in files that take the place of its control group's."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._total = folder, psutil.virtual_memory().total
        self._write("memory.max", self._total)
        self.use(ENOUGH)

    def use(self, share: float) -> None:
        """A share of all memory."""
        used = int(share * self._total)
        self._write("memory.stat", f"anon {used}\nshmem 0\ninactive_file 0\nactive_file 0\n")
        self._write("memory.current", used)

    def _write(self, name: str, value: object) -> None:
        draft = self._folder / "draft"
        draft.write_text(f"{value}\n")
        draft.rename(self._folder / name)

    @property
    def around(self) -> list[str]:
        """Before a command that has these files."""
        script = 'mount --bind "$0" /sys/fs/cgroup && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(self._folder)]


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    made = Memory(tmp_path / "memory")
    tried = subprocess.run([*made.around, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a control group's files cannot be replaced here: {tried.stderr.strip()}")
    return made


@pytest.mark.chaos("label", "out of memory")
@pytest.mark.chaos("score", "out of memory")
@pytest.mark.chaos("sft", "out of memory")
@pytest.mark.chaos("grpo", "out of memory")
@pytest.mark.chaos("evaluate", "out of memory")
def test_memory_that_runs_out(
    chance: Random, recovery: Recovery, finished: FinishedRun, memory: Memory, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def workers() -> set[psutil.Process]:
        """The run's processes that Ray may kill, except those without work."""
        found = {each: title(each) for each in psutil.Process().children(recursive=True)}
        return {each for each, name in found.items() if name.startswith("ray::") and name != "ray::IDLE"}

    def run_out(stage: str) -> str:
        before, deadline = workers(), time.monotonic() + LIMIT_S
        memory.use(SCARCE)
        while before <= workers():
            assert time.monotonic() < deadline, "Ray killed nothing"
            time.sleep(0.02)
        memory.use(ENOUGH)
        return "out of memory"

    said = "the machine ran out of memory"
    ends_undisturbed(finished, run, {}, run_out, chance, recovery, around=memory.around, may_end=said)
