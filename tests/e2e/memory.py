"""Fault injection: a machine whose memory is nearly all in use, as far as Ray can see."""

import subprocess
from pathlib import Path

import psutil
import pytest

from tests.processes import below
from tests.waiting import wait_until

ENOUGH, SCARCE = 0.1, 0.97
"""Shares of the memory in use; Ray kills from 0.95 on."""
LIMIT_S = 60
"""Until Ray has killed something."""


class Memory:
    """What Ray reads of a machine's memory, in files that take the place of its control group's."""

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

    def run_out(self) -> None:
        """Until Ray has killed a process that works for this test."""
        before = _workers()
        self.use(SCARCE)
        try:
            wait_until("Ray kills something", lambda: not before <= _workers(), LIMIT_S, every_s=0.02)
        finally:
            self.use(ENOUGH)

    def _write(self, name: str, value: object) -> None:
        draft = self._folder / "draft"
        draft.write_text(f"{value}\n")
        draft.rename(self._folder / name)

    @property
    def around(self) -> list[str]:
        """Before a command that has these files."""
        script = 'mount --bind "$0" /sys/fs/cgroup && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(self._folder)]


def replaceable(folder: Path) -> Memory:
    """A new `Memory`; the test is skipped where these files cannot be replaced."""
    made = Memory(folder)
    tried = subprocess.run([*made.around, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a control group's files cannot be replaced here: {tried.stderr.strip()}")
    return made


def _workers() -> set[psutil.Process]:
    """This process's descendants that Ray may kill, except those without work."""
    return set(below(r"^ray::(?!IDLE$)"))
