"""One command at a time works in a run directory: the lock, its holders and their ends."""

import errno
import json
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorapar_ray import run_lock
from lorapar_ray.errors import UserError
from lorapar_ray.threads import meanwhile
from tests.unit.faked_run import Cli
from tests.unit.faked_stages import in_a_child


def test_a_second_command_names_the_first(cli: Cli, tmp_path: Path) -> None:
    assert cli("label")[0] == 0
    ready, done = tmp_path / "ready", tmp_path / "done"
    child = os.fork()
    if child == 0:
        with run_lock.run_lock(cli.run.root):
            ready.touch()
            while not done.exists():
                time.sleep(0.01)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    try:
        status, said = cli("score")
        assert status == 2 and f"in use by process {child} on " in said and "lock.json" in said, said
        assert not cli.run.scores.exists()
    finally:
        done.touch()
        os.waitpid(child, 0)
    assert cli("score")[0] == 0
    assert not (cli.run.root / run_lock.NAME).exists()


def test_the_lock_of_a_dead_process_is_taken_over(cli: Cli) -> None:
    assert cli("label")[0] == 0

    def die() -> None:
        with run_lock.run_lock(cli.run.root):
            os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(die, signal.SIGKILL)
    assert (cli.run.root / run_lock.NAME).is_file()
    assert cli("score")[0] == 0
    assert [path.name for path in cli.run.root.iterdir() if run_lock.NAME in path.name] == []


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch a lock for a moment instead of half a minute."""
    monkeypatch.setattr(run_lock, "SURE_S", 0.2)
    monkeypatch.setattr(run_lock, "RETRY_S", 0.05)


@pytest.mark.parametrize(
    ("holder", "age", "lives"),
    [
        ({}, 0, True),
        ({"pid": 1}, 0, False),  # process 1 started at another time than the holder
        ({"started": 5}, 0, False),  # its pid now belongs to another process
        ({"pid": "no number"}, 0, False),
        ({"host": "elsewhere"}, 10, True),
        ({"host": "elsewhere"}, run_lock.STALE_S + 10, False),
        ({"boot": "before"}, 10, True),
        ({"namespace": "pid:[1]"}, run_lock.STALE_S + 10, False),
    ],
)
def test_a_holder_is_known_by_process_here_and_by_its_beat_elsewhere(
    holder: dict[str, Any], age: float, lives: bool, tmp_path: Path, quick_watch: None
) -> None:
    file = tmp_path / run_lock.NAME
    file.write_text(json.dumps(run_lock.identity() | holder))
    os.utime(file, (time.time() - age, time.time() - age))
    if lives:
        with pytest.raises(UserError, match="in use by process"), run_lock.run_lock(tmp_path):
            pass
    else:
        with run_lock.run_lock(tmp_path), run_lock.run_lock(tmp_path):
            assert json.loads(file.read_text())["pid"] == os.getpid()
        assert not file.exists()


def test_a_clock_ahead_of_the_file_system_s_shows_a_living_holder_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine, where only `lorapar status` looks."""
    file = tmp_path / run_lock.NAME
    file.write_text(json.dumps(run_lock.identity() | {"host": "elsewhere"}))
    fast = {"time": lambda: time.time() + run_lock.STALE_S}
    monkeypatch.setattr(run_lock, "time", SimpleNamespace(**{**vars(time), **fast}))
    found = run_lock.living_holder(tmp_path)
    assert found is not None and found["host"] == "elsewhere"
    os.utime(file, (time.time() - run_lock.STALE_S - 10,) * 2)
    assert run_lock.living_holder(tmp_path) is None and list(tmp_path.iterdir()) == [file]


def test_a_lock_that_a_full_disk_does_not_take_is_not_left_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the file is created, and the write fails."""

    def write_nothing() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match=r"cannot be written to .File too large"), run_lock.run_lock(tmp_path):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(write_nothing, signal.SIGKILL)
    with run_lock.run_lock(tmp_path):
        assert [each.name for each in tmp_path.iterdir()] == [run_lock.NAME]


@pytest.mark.parametrize("clock", ["of the file system, set forwards", "of the holder, which touches it by its own"])
def test_a_clock_that_is_set_takes_no_lock_from_a_living_holder(clock: str, tmp_path: Path, quick_watch: None) -> None:
    """A holder on another machine: only its beat is known."""
    file, hours = tmp_path / run_lock.NAME, 3 * 3600
    text = json.dumps(run_lock.identity() | {"host": "elsewhere"})
    file.write_text(text)
    late = 0 if "set forwards" in clock else hours
    os.utime(file, (time.time() - hours,) * 2)
    with (
        meanwhile(lambda: os.utime(file, (time.time() - late,) * 2), every_s=0.1),
        pytest.raises(UserError, match="in use by process"),
        run_lock.run_lock(tmp_path, wait_s=0.5),
    ):
        pass
    assert file.read_text() == text


def test_a_clock_that_is_set_back_keeps_no_dead_holder_alive(
    tmp_path: Path, quick_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock has tomorrow's time, and stays untouched."""
    monkeypatch.setattr(run_lock, "STALE_S", 0.5)
    file = tmp_path / run_lock.NAME
    file.write_text(json.dumps(run_lock.identity() | {"host": "elsewhere"}))
    os.utime(file, (time.time() + 86400,) * 2)
    with pytest.raises(UserError, match="in use by process"), run_lock.run_lock(tmp_path):
        pass
    with run_lock.run_lock(tmp_path, wait_s=5):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_of_many_that_find_a_dead_holder_one_gets_the_lock_at_a_time(tmp_path: Path) -> None:
    (tmp_path / run_lock.NAME).write_text(json.dumps(run_lock.identity() | {"started": 5}))
    log = tmp_path / "log"
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            for _ in range(200):
                try:
                    with run_lock.run_lock(tmp_path):
                        with log.open("a") as lines:
                            lines.write(f"in {os.getpid()}\n")
                        time.sleep(0.002)
                        with log.open("a") as lines:
                            lines.write(f"out {os.getpid()}\n")
                    os._exit(0)
                except UserError:
                    time.sleep(0.005)
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    lines = log.read_text().splitlines()
    assert len(lines) == 16
    assert all(a.split()[1] == b.split()[1] for a, b in zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.parametrize("links", [True, False])
def test_a_lock_that_was_taken_meanwhile_is_put_back(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between this process's look at a dead holder's lock and its removal, another process removes it and takes one."""
    file, living = tmp_path / run_lock.NAME, json.dumps(run_lock.identity() | {"token": "of the other"})
    file.write_text(json.dumps(run_lock.identity() | {"started": 5}))

    class Slow(run_lock.Watch):
        def lives(self, holder: dict[str, Any], changed_s: float, age: float) -> bool | None:
            found = super().lives(holder, changed_s, age)
            file.write_text(living)
            return found

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    run_lock._remove_if_stale(file, Slow())
    assert [each.name for each in tmp_path.iterdir()] == [run_lock.NAME] and file.read_text() == living
    with pytest.raises(UserError, match="in use by process"), run_lock.run_lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("content", "said"),
    [("[" * 100_000, ""), ('{"pid": 99999999, "started": null}', ""), ("folder", "is a directory"), ("link", "link")],
)
def test_an_invalid_lock_is_taken_or_named(content: str, said: str, tmp_path: Path, quick_watch: None) -> None:
    file = tmp_path / run_lock.NAME
    if content == "folder":
        file.mkdir()
    elif content == "link":
        file.symlink_to("nowhere")
    else:
        own = {key: value for key, value in run_lock.identity().items() if key in ("host", "boot", "namespace")}
        file.write_text(json.dumps(own | json.loads(content)) if content[0] == "{" else content)
        os.utime(file, (1, 1))
    try:
        with run_lock.run_lock(tmp_path):
            assert not said
    except UserError as error:
        assert said and said in str(error).lower()


def test_a_suspended_holder_whose_lock_was_taken_writes_nothing_more(cli: Cli) -> None:
    assert cli("label")[0] == 0
    file, before = cli.run.root / run_lock.NAME, cli.run.manifest_path.read_text()
    with run_lock.run_lock(cli.run.root):
        other = json.dumps({"host": "elsewhere"})
        file.write_text(other)
        with pytest.raises(UserError, match="was taken over by another command"):
            cli.run.record("label", status="started")
        assert cli.run.manifest_path.read_text() == before
    assert file.read_text() == other
