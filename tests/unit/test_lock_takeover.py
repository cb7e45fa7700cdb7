"""The lock of a holder on another machine, as of a job whose whole cluster has died: when it is taken over."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorapar_ray import run_lock
from lorapar_ray.run_lock import BEAT, BEAT_S, LOOK_S, RETRY_S, SILENT_S, STALE_S, SURE_S, Watch

ELSEWHERE = run_lock.identity() | {"host": "head-of-a", "pid": 7, "command": "lorapar run", BEAT: BEAT_S}
OF_AN_EARLIER_VERSION = {key: value for key, value in ELSEWHERE.items() if key != BEAT}


class Watched:
    """A lock that is looked at every `RETRY_S`, by a clock that only this test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, holder: dict[str, object], age: float = 0.0) -> None:
        self._watch, self._holder = Watch(), holder
        self._now, self._touched = 1000.0, 1000.0 - age
        monkeypatch.setattr(run_lock, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: self._now}))

    def touch(self) -> None:
        self._touched = self._now

    def look(self, after_s: float = RETRY_S) -> bool | None:
        self._now += after_s
        return self._watch.lives(self._holder, self._touched, self._now - self._touched)

    def seconds_until_dead(self) -> float:
        start = self._now
        while self.look() is not False:
            assert self._now < start + 10 * STALE_S
        return self._now - start


@pytest.mark.parametrize("beat", [BEAT_S, 0.9 * SILENT_S])
def test_a_holder_that_touches_its_lock_is_left_alone(monkeypatch: pytest.MonkeyPatch, beat: float) -> None:
    """Also if it misses most of its beats."""
    lock = Watched(monkeypatch, ELSEWHERE)
    for _ in range(100):
        for _ in range(int(beat // RETRY_S)):
            assert lock.look()
        lock.touch()


@pytest.mark.parametrize(
    ("holder", "age", "seconds"),
    [
        (ELSEWHERE, 0.0, SILENT_S),
        (ELSEWHERE, 200.0, SILENT_S),
        (ELSEWHERE, STALE_S, SURE_S),
        (OF_AN_EARLIER_VERSION, 0.0, STALE_S),
        (OF_AN_EARLIER_VERSION, STALE_S, SURE_S),
    ],
)
def test_a_silent_holder_is_dead(
    monkeypatch: pytest.MonkeyPatch, holder: dict[str, object], age: float, seconds: float
) -> None:
    """One of an earlier version, which touches its lock every 20 s, is given more time."""
    found = Watched(monkeypatch, holder, age).seconds_until_dead()
    assert seconds <= found <= seconds + SURE_S + 2 * RETRY_S


def test_one_that_falls_silent_while_it_is_watched_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Watched(monkeypatch, ELSEWHERE)
    assert lock.look()
    lock.touch()
    assert SILENT_S <= lock.seconds_until_dead() <= SILENT_S + 2 * RETRY_S


def test_storage_that_hangs_for_all_machines_is_no_sign_of_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could touch the lock meanwhile."""
    lock = Watched(monkeypatch, ELSEWHERE)
    assert lock.look()
    assert lock.look(after_s=SILENT_S + 20)
    lock.touch()
    assert lock.look()
    hanging = [lock.look(after_s=3600) for _ in range(int(SURE_S // LOOK_S))]
    assert False not in hanging


def test_the_next_command_says_from_whom_it_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "SILENT_S", 0.3)
    monkeypatch.setattr(run_lock, "RETRY_S", 0.05)
    file = tmp_path / run_lock.NAME
    for holder, why in ((ELSEWHERE, "no sign of life for "), (run_lock.identity() | {"started": 5}, "it has ended")):
        file.write_text(json.dumps(holder))
        with run_lock.run_lock(tmp_path, wait_s=60):
            assert json.loads(file.read_text())[BEAT] == BEAT_S
        said = capsys.readouterr().out
        assert f"  takes over from process {holder['pid']} on {holder['host']} (" in said and why in said
        assert ("  waiting up to 60 s: run directory" in said) == (holder is ELSEWHERE)
        assert [*tmp_path.iterdir()] == []
