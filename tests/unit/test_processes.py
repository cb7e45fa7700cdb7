"""Processes forked for an engine: their environment, and when they end. vLLM's processes are tested in tests/e2e."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lorapar_ray.engines.phases import Phases
from lorapar_ray.engines.processes import UNUSABLE, ForkContext, answer_of, cuda_is_lost
from tests.waiting import wait_until

ORPHAN = """
import sys, time
from pathlib import Path
from lorapar_ray.engines.processes import ForkContext
from tests.unit.test_processes import note_and_sleep

if __name__ == "__main__":
    ForkContext(Path("unused")).Process(target=note_and_sleep, name="core", kwargs={"file": sys.argv[1]}).start()
    time.sleep(60)
"""


def note_environment(file: str) -> None:
    Path(file).write_text(os.environ["LORAPAR_TEST_LATE"])


def note_and_sleep(file: str) -> None:
    Path(f"{file}.part").write_text(str(os.getpid()))
    Path(f"{file}.part").rename(file)
    time.sleep(60)


def seven() -> int:
    return 7


def fails() -> int:
    raise KeyError("what was asked")


def test_a_forked_process_has_the_current_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ForkContext(tmp_path)
    for word in ("one", "two"):  # the fork server keeps its first environment
        monkeypatch.setenv("LORAPAR_TEST_LATE", word)
        process = context.Process(target=note_environment, name="core", kwargs={"file": str(tmp_path / word)})
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert (tmp_path / word).read_text() == word
    assert not (tmp_path / UNUSABLE).exists()


@pytest.mark.slow
def test_a_forked_process_ends_with_the_one_that_asked_for_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    asker = subprocess.Popen([sys.executable, "-c", ORPHAN, str(file)])
    try:
        wait_until("the fork has begun", file.is_file)
        pid = int(file.read_text())
        assert psutil.pid_exists(pid)
    finally:
        asker.send_signal(signal.SIGKILL)  # as Ray ends an actor: it cannot tidy up
        asker.wait()
    wait_until("the fork has ended", lambda: not psutil.pid_exists(pid))


def test_a_short_lived_fork_returns_its_result() -> None:
    assert answer_of(seven) == 7
    with pytest.raises(RuntimeError, match="KeyError: 'what was asked'"):
        answer_of(fails)


def test_a_machine_without_a_gpu_has_lost_none() -> None:
    assert not cuda_is_lost()


def test_phases_are_lines_of_the_log_with_their_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases("engine")
    with phases.phase("importing"):
        pass
    assert list(phases.seconds) == ["importing"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lorapar: engine: importing"
    assert lines[1].startswith("lorapar: engine: importing: 0.0 s")
