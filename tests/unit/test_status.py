"""`lorapar status`: a run's progress from its directory, during a command and afterwards."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.progress import Pace, SafeConsole, noted_in, progress
from lorapar_ray.run_lock import run_lock
from lorapar_ray.runs import PROGRESS, RunDirectory
from lorapar_ray.status import follow, lines
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
        with (
            noted_in(run.work / PROGRESS, "score", report),
            progress("score", 10, lambda: (next(counts), "loss 0.5\x1b[2J")),
        ):
            wait_until("the third report", lambda: "6/10" in scoring(), 20)
            line = scoring()
        assert line.startswith("▶ score      score 6/10") and line.endswith("loss 0.5\\x1b[2J")
        assert not (run.work / PROGRESS).exists()
        assert {("score", 2, 10), ("score", 6, 10)} <= set(told)
        write_json(run.work / PROGRESS, {"done": "many"})
        assert scoring().split() == ["▶", "score", "starting"]
    assert "no command is running" in next(iter(lines(run)))


def test_only_the_stage_that_the_note_names_is_at_work(run: RunDirectory) -> None:
    stages = {**STAGES, "sft": {"status": "started", "seconds": 5.0}}
    write_json(run.root / "manifest.json", {"format": 2, "identity": {"name": "x"}, "stages": stages})
    left = {"stage": "sft", "what": "sft", "done": 3, "total": 9, "left": "", "remark": "", "now": time.time()}
    write_json(run.work / PROGRESS, left)  # by a process that was killed

    def marks() -> dict[str, str]:
        return {line.split()[1]: " ".join([line.split()[0], *line.split()[2:]]) for line in lines(run)}

    with run_lock(run.root):
        assert marks()["score"] == "✗ interrupted after 2:10; the same command resumes"
        assert marks()["sft"] == "▶ sft 3/9"
        with noted_in(run.work / PROGRESS, "score", lambda what, total: lambda done: None):
            assert marks()["score"] == "▶ starting"
            assert marks()["sft"] == "✗ interrupted after 0:05; the same command resumes"
    assert marks()["score"].startswith("✗")


def test_a_command_removes_the_note_of_a_killed_one(run: RunDirectory) -> None:
    data = {"train": [{"reader": "file", "path": "rows.jsonl"}]}
    config = Config.model_validate({"name": "x", "model": {"path": "m"}, "data": data})
    new = RunDirectory(run.root / "new")
    with new.at_work(config):
        pass
    write_json(new.work / PROGRESS, {"stage": "sft"})
    with new.at_work(config):
        assert not (new.work / PROGRESS).exists()


def test_the_live_view_follows_until_the_command_ends(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr("lorapar_ray.status.console", SafeConsole(file=text, force_terminal=True, width=120))
    monkeypatch.setattr("lorapar_ray.status.REFRESH_S", 0.01)
    view = threading.Thread(target=follow, args=(run,))
    with run_lock(run.root):
        view.start()
        for done in (3, 4):
            figures = {"what": "score", "done": done, "total": 9, "left": " · 0:09 left", "remark": "loss 0.5"}
            write_json(run.work / PROGRESS, {"stage": "score", **figures, "now": time.time()})
            wait_until("the view's line", partial(_shows, text, f"score {done}/9"), 20)
        assert view.is_alive()
    view.join(20)
    assert not view.is_alive()
    last = text.getvalue().rpartition("x · ")[2]
    assert "no command is running" in last and "interrupted after 2:10" in last


def _shows(text: io.StringIO, part: str) -> bool:
    return part in text.getvalue()


def test_the_lines_of_a_job_s_log(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr("lorapar_ray.progress.console", SafeConsole(file=text, width=120))
    monkeypatch.setattr("lorapar_ray.progress.LOG_EVERY_S", 0.01)
    now = [(0, "starting")]

    def said() -> list[str]:
        return text.getvalue().splitlines()

    with progress("sft", 20, lambda: now[0]):
        for lines_so_far, figures in enumerate([(0, "starting"), (2, "loss 3.5"), (10, "loss 1.5")], 1):
            now[0] = figures
            wait_until("the next line", partial(_as_many, said, lines_so_far), 20)
        now[0] = 20, "loss 0.5"
    first, second, third, *_, last = said()
    assert (first, second, last) == ("  sft 0/20 starting", "  sft 2/20 loss 3.5", "  sft 20/20 loss 0.5")
    assert re.fullmatch(r"  sft 10/20 · \d+:\d\d left loss 1\.5", third)


def _as_many(said: Callable[[], list[str]], count: int) -> bool:
    return len(said()) >= count


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
