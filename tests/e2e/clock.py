"""Fault injection: a wall clock that jumps, for the Python of a command and of every process below it.

What only counts on (`time.monotonic`) is not touched, and files keep the times that the system gives them.
"""

import os
from collections.abc import Mapping
from pathlib import Path

HOURS = "LORAPAR_TEST_HOURS"
LONGEST_H = 30
"""Of a jump."""
PATCH = f'''
"""Fault injection: `time.time` and what is made of it are as many hours off as a file says."""
import os
import time

real = {{name: getattr(time, name) for name in ("time", "time_ns", "localtime", "gmtime", "strftime")}}


def seconds():
    with open(os.environ["{HOURS}"]) as file:
        return float(file.read()) * 3600


def now():
    return real["time"]() + seconds()


time.time = now
time.time_ns = lambda: real["time_ns"]() + int(seconds() * 1e9)
time.localtime = lambda at=None: real["localtime"](now() if at is None else at)
time.gmtime = lambda at=None: real["gmtime"](now() if at is None else at)
time.strftime = lambda form, at=None: real["strftime"](form, time.localtime() if at is None else at)
'''


class WallClock:
    """Runs `hours` before or after this machine's."""

    def __init__(self, folder: Path) -> None:
        """`folder`: a new one for the patch and the number of hours."""
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(PATCH)
        self._folder = folder
        self.hours = 0.0
        self.jump_to(0.0)

    def jump_to(self, hours: float) -> None:
        """The processes see it at once."""
        self.hours = hours
        draft = self._folder / "draft"
        draft.write_text(str(hours))
        draft.rename(self._folder / "hours")

    @property
    def environment(self) -> Mapping[str, str]:
        """Of a command that lives by it."""
        others = os.environ.get("PYTHONPATH")
        path = f"{self._folder}:{others}" if others else str(self._folder)
        return {"PYTHONPATH": path, HOURS: str(self._folder / "hours")}
