"""Fault injection: teachers that log every request and fail as configured.

Settings in `extra_body`: `log` (a file; each request appends "process teacher question"), `latency_s`, `accuracy`,
`die_after` (requests answered before every further one fails), `dead_while` (a file; fail as long as it exists).
"""

import os
from collections import Counter
from pathlib import Path

from lorapar_ray.config import TeacherConfig
from lorapar_ray.labeling.simulated import SimulatedTeacher, asked_about
from lorapar_ray.labeling.teachers import Asked


class FaultyTeacher(SimulatedTeacher):
    def __init__(self, teacher: TeacherConfig) -> None:
        super().__init__(teacher)
        self._settings = teacher.extra_body
        self._answered = 0

    async def ask(self, prompt: str, choices: list[str]) -> Asked:
        note(Path(self._settings["log"]), self._name, asked_about(prompt)[0])
        asked = await super().ask(prompt, choices)
        self._answered += 1
        if self._answered > self._settings.get("die_after", float("inf")):
            raise ConnectionError("the teacher is dead")
        if "dead_while" in self._settings and Path(self._settings["dead_while"]).exists():
            raise ConnectionError("the teacher is away")
        return asked


def note(log: Path, teacher: str, question: str) -> None:
    """Append one line; short writes to a file opened for appending are atomic."""
    with log.open("a") as file:
        file.write(f"{os.getpid()} {teacher} {question}\n")


def noted(log: Path) -> Counter[tuple[str, str]]:
    """Number of requests by (teacher, question)."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return Counter((teacher, question) for _, teacher, question in (line.split(" ", 2) for line in lines))
