"""`lorapar status`: a run's progress from its directory, during a command and afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.progress import Pace, noted_in, progress
from lorapar_ray.run_lock import run_lock
from lorapar_ray.runs import PROGRESS, RunDirectory
from lorapar_ray.status import lines
from tests.waiting import wait_until

STAGES = {"label": {"status": "done", "seconds": 61.0}, "score": {"status": "started", "seconds": 130.0}}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    write_json(tmp_path / "manifest.json", {"format": 2, "identity": {"name": "x"}, "stages": STAGES})
    return RunDirectory(tmp_path)


def test_a_run_that_was_interrupted(run: RunDirectory) -> None:
    first, label, score, partition, *_ = lines(run)
    assert first == f"x · {run.root} · no command is running"
    assert label.split() == ["✓", "label", "1:01"]
    assert score.split(maxsplit=2) == ["✗", "score", "interrupted after 2:10; the same command resumes"]
    assert partition.split() == ["·", "partition"]


def test_a_run_at_work(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapar_ray.progress.NOTE_EVERY_S", 0.01)
    counts, told = iter([2, 3, *[6] * 10_000]), []

    def scoring() -> str:
        return next(line for line in lines(run) if "score" in line)

    def report(what: str, total: int) -> Callable[[int], None]:
        return lambda done: told.append((what, done, total))

    with run_lock(run.root):
        assert scoring().split() == ["▶", "score", "starting"]
        with noted_in(run.work / PROGRESS, report), progress("score", 10, lambda: (next(counts), "loss 0.5\x1b[2J")):
            wait_until("the third report", lambda: "6/10" in scoring(), 20)
            line = scoring()
        assert line.startswith("▶ score      score 6/10") and line.endswith("loss 0.5\\x1b[2J")
        assert not (run.work / PROGRESS).exists()
        assert {("score", 2, 10), ("score", 6, 10)} <= set(told)
        write_json(run.work / PROGRESS, {"done": "many"})
        assert scoring().split() == ["▶", "score", "starting"]
    assert "no command is running" in next(iter(lines(run)))


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        list(lines(RunDirectory(tmp_path)))


def test_the_pace_is_that_since_the_work_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 160.0, 170.0, 180.0, 190.0])
    monkeypatch.setattr("lorapar_ray.progress.time.monotonic", lambda: next(now))
    pace = Pace(20)  # a minute of starting, then a step in 5 s
    assert [pace.left(done) for done in (0, 1, 3, 5, 20)] == ["", "", " · 1:25 left", " · 1:15 left", ""]
    few = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("lorapar_ray.progress.time.monotonic", lambda: next(few))
    three = Pace(3)
    assert [three.left(done) for done in (0, 1, 2)] == ["", "", ""]
