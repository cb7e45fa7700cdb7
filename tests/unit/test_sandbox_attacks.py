"""Every attack of `sandbox_attacks` on every layer of this machine."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lorapar_ray.sandbox import Job, Limits, Sandbox, Verdict, survey
from tests.unit import sandbox_attacks as attacks

pytestmark = pytest.mark.slow
LAYERS = [finding.name for finding in survey() if finding.layer is not None]
AT_ONCE = 8
HONEST = Job("def f(x):\n    return x + 2", "assert f(2) == 4", ("f",))
SLACK_S = 30.0
"""A busy machine starts and ends processes late; a job that never ends is still detected."""


@dataclass
class Outside:
    """The attacks' targets, and whether an attack reached them."""

    folder: Path
    port: int
    abstract: str
    mark: str
    hits: list[str]

    def aimed(self, code: str, layer: str) -> str:
        """The attack, on these targets."""
        places: dict[str, object] = {"SCRATCH": scratch(layer, self.folder)}
        places |= {"SECRET": self.folder / "secret", "WITNESS": self.folder / "witness", "PORT": self.port}
        places |= {"ABSTRACT": self.abstract, "PID": os.getpid(), "MARK": self.mark}
        for name, value in places.items():
            code = code.replace(name, str(value))
        return code

    def state(self) -> list[object]:
        """Checks that no attack changed the targets."""
        secret = (self.folder / "secret").stat()
        left = [
            str(each)
            for place in ("/tmp", "/var/tmp", "/dev/shm", "/", "/root", "/usr/lib")
            for each in _marked(place, self.mark)
        ]
        return [
            *((self.folder / "secret").read_text(), secret.st_mode, secret.st_mtime_ns, secret.st_uid),
            *(sorted(each.name for each in (self.folder / "witness").iterdir()), left, list(self.hits)),
            *(resource.getrlimit(resource.RLIMIT_NOFILE), os.sched_getaffinity(0), os.getpriority(0, 0)),
            *(socket.gethostname(), Path("/proc/sysvipc/shm").read_text().count(str(0x51AB51AB))),
        ]


def scratch(layer: str, folder: Path) -> str:
    """Where an attack writes: a folder of its own sandbox; on the layer that confines no files, `folder`."""
    return str(folder) if layer == "process" else "/tmp"


def _marked(place: str, mark: str) -> list[Path]:
    with suppress(OSError):
        return list(Path(place).glob(f"*{mark}*"))
    return []


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "witness").mkdir()
    (folder / "secret").write_text("the secret")
    (folder / "secret").chmod(0o600)
    os.setxattr(folder / "secret", "user.note", b"another secret")
    mark = f"mark{uuid.uuid4().hex[:8]}"
    hits: list[str] = []
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    listeners[1].bind(f"\0{mark}")
    here = Path.cwd()
    os.chdir(folder / "witness")  # the name of a socket holds 107 bytes
    listeners[2].bind("socket")
    os.chdir(here)
    made = Outside(folder, listeners[0].getsockname()[1], mark, mark, hits)

    def watch(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                hits.append(str(listener.accept()[0]))

    for each in listeners:
        each.listen()
        threading.Thread(target=watch, args=(each,), daemon=True).start()
    os.environ["LORAPAR_SECRET"] = "the secret"
    yield made
    del os.environ["LORAPAR_SECRET"]
    for each in listeners:
        each.close()


def attack(layer: str, limits: Limits, jobs: dict[str, Job]) -> dict[str, Verdict]:
    """The verdict on each job; after each job an honest one must pass, and at the end no process may be left."""
    seconds = limits.seconds + int(uuid.uuid4().hex[:6], 16) * 1e-9  # a mark in each process's command line
    mixed = [each for job in jobs.values() for each in (job, HONEST)]
    with Sandbox(layer, replace(limits, seconds=seconds), workers=AT_ONCE) as sandbox:
        verdicts = sandbox.run(mixed)
        assert {verdict.reason for verdict in verdicts[1::2]} == {"passed"}
    assert not [pid for pid in running() if str(seconds) in pid[1]]
    assert max(verdict.seconds for verdict in verdicts) < limits.seconds + SLACK_S
    return dict(zip(jobs, verdicts[::2], strict=True))


def running() -> list[tuple[str, str]]:
    """(pid, command) of every process except zombies."""
    found = []
    for path in Path("/proc").iterdir():
        with suppress(OSError):
            if path.name.isdigit() and (command := (path / "cmdline").read_bytes()):
                found.append((path.name, command.decode(errors="replace")))
    return found


LIMITS = Limits(seconds=2.0, memory_mb=256, output_kb=256)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_verdict_is_forged(layer: str) -> None:
    jobs = {name: Job(code, tests, ("f",)) for name, (code, tests) in attacks.FORGERIES.items()}
    verdicts = attack(layer, LIMITS, jobs)
    assert [name for name, verdict in verdicts.items() if verdict.passed or verdict.reason == "tests"] == []


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_gets_out(layer: str, outside: Outside) -> None:
    programs = attacks.ESCAPES | ({} if layer == "process" else attacks.FILES)
    before = outside.state()
    jobs = {name: Job(outside.aimed(code, layer), "assert not f(), f()", ("f",)) for name, code in programs.items()}
    verdicts = attack(layer, LIMITS, jobs)
    died = {"32-bit system calls", "x32 system calls"}  # the filter ends the process
    wrong = {name: verdict for name, verdict in verdicts.items() if not verdict.passed and name not in died}
    assert wrong == {}
    assert {verdicts[name].reason for name in died} == {"died"}
    assert outside.state() == before


@pytest.mark.parametrize("layer", LAYERS)
def test_floods_end_at_their_limits(layer: str, tmp_path: Path) -> None:
    place = scratch(layer, tmp_path)
    jobs = {
        name: Job(code.replace("SCRATCH", place), "assert f() == 4", ("f",)) for name, code in attacks.FLOODS.items()
    }
    verdicts = attack(layer, LIMITS, jobs)
    assert {verdict.reason for verdict in verdicts.values()} <= {"failed", "raised", "timeout", "output", "died"}
    hanging = "endless loop", "endless definition", "sleep", "half an answer", "error that hangs", "truth that hangs"
    for name in hanging:
        assert verdicts[name].reason == "timeout", name
    for name in ("output", "errors", "output past the writer"):
        assert verdicts[name].reason == "output", name
    assert "MemoryError" in verdicts["memory at once"].detail


@pytest.mark.parametrize(("layer", "processes"), [(layer, False) for layer in LAYERS] + [("bubblewrap", True)])
def test_processes_end_with_their_job(layer: str, processes: bool) -> None:
    if layer not in LAYERS:
        pytest.skip("no bubblewrap here")
    jobs = {name: Job(code, "assert f() == 4", ("f",)) for name, code in attacks.PROCESSES.items()}
    sleeping = {number for number, command in running() if "sleep\0300" in command}
    attack(layer, replace(LIMITS, processes=processes), jobs)
    assert {number for number, command in running() if "sleep\0300" in command} <= sleeping


HARMLESS = [
    "attributes of the secret",
    *("read a secret", "read other users' files", "read processes", "read the environment of others", "write outside"),
    *(
        "environment",
        "connect to the network",
        "send a datagram",
        "listen",
        "abstract socket",
        "socket in the file system",
    ),
    *("kill the parent", "signal a thread", "pidfd", "signal by owner", "memfd", "watch files", "32-bit system calls"),
    *("lock it", "room of the user's pipes", "timers of the user", "slots of asynchronous input", "reopen by path"),
    *(
        "lease on shared files",
        "watch a folder",
        "network interfaces",
        "outlive the parent",
        "through another's root",
        "symlink to the secret",
        "mode of the secret",
    ),
]


def test_the_attacks_work_where_there_is_no_sandbox(outside: Outside) -> None:
    """An attack that fails without a sandbox too would show nothing."""
    programs = {name: outside.aimed((attacks.ESCAPES | attacks.FILES)[name], "process") for name in HARMLESS}
    programs["kill the parent"] = programs["kill the parent"].replace("os.kill(os.getppid(), 9) is None", "0")
    script = "import sys, json\nout = {}\nfor name, code in json.load(sys.stdin).items():\n"
    script += "    space = {}\n    exec(code, space)\n    out[name] = bool(space['f']())\nprint(json.dumps(out))"
    import json

    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(programs), capture_output=True, text=True, check=True
    )
    for each in _marked("/tmp", outside.mark) + _marked(str(outside.folder / "witness"), outside.mark):
        each.unlink()
    assert json.loads(done.stdout) == dict.fromkeys(HARMLESS, True)
