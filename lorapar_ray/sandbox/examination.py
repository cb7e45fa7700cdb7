"""Jobs, verdicts, and the pair of confined processes that runs a job."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.sandbox.cgroups import Cgroup
from lorapar_ray.sandbox.inside.wire import Channel, WireError
from lorapar_ray.sandbox.layers import Layer, Start, spawn
from lorapar_ray.sandbox.limits import Limits

START_S = 60.0
"""Time limit for a sandbox's start, long enough for a busy machine."""
VERDICT_S = 2.0
"""Time limit for the tests to notice that the program was killed."""
END_S = 10.0
"""Time limit for killed processes to end."""
TRIES = 3
"""Attempts to start a program's process: a failed start on a busy machine is not the program's fault."""
KEPT = 4096
"""Bytes of output that a verdict holds."""
EXAMINER_MB = 1024


class SandboxError(UserError):
    """The sandbox itself does not work."""


@dataclass(frozen=True)
class Job:
    """A program and its tests."""

    code: str
    """The program, written by a model."""
    tests: str
    """A program that calls the tested functions; the job passes if it runs to its end. Arguments and results are passed
    by value."""
    names: tuple[str, ...]
    """The functions of `code` that `tests` calls; all other names come from Python or `setup`."""
    setup: str = ""
    """Run before the tests, in their process: imports and helpers that the tests need."""


@dataclass(frozen=True)
class Verdict:
    """The result of a job."""

    reason: str
    """`passed`; `failed` (an assertion), `raised`, `timeout`, `output` (too much), `died` (the process ended), or
    `tests` (the tests or the setup are themselves at fault)."""
    detail: str
    """The exception and its line; empty for `passed`."""
    seconds: float
    output: str = field(default="", repr=False)
    """The beginning of the program's output."""

    @property
    def passed(self) -> bool:
        """Whether all tests passed."""
        return self.reason == "passed"


class Examination:
    """Runs one pair at a time: a warm process for tests, and a new process for each program.

    The test process sends the verdict over a socket that the program's process does not have. A program cannot affect
    the next one through its process or files, since both are new for each job. Belongs to one thread; its processes die
    with the thread.
    """

    def __init__(self, layer: Layer, limits: Limits) -> None:
        self._layer = layer
        self._limits = limits
        self._cgroup = Cgroup(limits)
        self._examiner: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def run(self, job: Job) -> Verdict:
        """Run one job; returns its verdict.

        Raises:
            SandboxError: no confined process can be started, or one cannot be ended.
        """
        for _ in range(TRIES):
            verdict = self._run(job)
            if verdict.reason != "unready":
                return verdict
        raise SandboxError(f"sandbox: {self._layer.name} cannot start a process: {verdict.output or verdict.detail}")

    def close(self) -> None:
        """End the processes."""
        self._stop()
        self._cgroup.close()

    def _run(self, job: Job) -> Verdict:
        control = self._ready()
        begin = time.monotonic()
        start = Start("candidate", self._limits)
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        output = Output(read, self._limits.output_kb * 1024)
        try:
            with ours:
                try:
                    streams = {"stdin": theirs.fileno(), "stdout": write, "stderr": write}
                    program = spawn(self._layer, start, **streams, wrap=self._cgroup.command)
                finally:
                    theirs.close()
                    os.close(write)
                try:
                    reason, detail = self._decide(job, control, ours, output, program)
                finally:
                    _end(program, output)
        finally:
            output.close()
        return Verdict(reason, detail, time.monotonic() - begin, output.text)

    def _decide(
        self, job: Job, control: socket.socket, ours: socket.socket, output: Output, program: subprocess.Popen[bytes]
    ) -> tuple[str, str]:
        request = {"code": job.code, "setup": job.setup, "tests": job.tests, "names": job.names}
        try:
            socket.send_fds(control, [b"j"], [ours.fileno()])
            Channel(control.fileno()).send(request | {"seconds": self._limits.seconds})
        except (WireError, OSError) as error:
            self._stop()
            return "tests", f"the job cannot be passed on: {error}"
        ours.close()
        return self._follow(control, output, program)

    def _stop(self) -> None:
        """End the process of the tests; the next job starts another."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._examiner is not None:
            self._examiner.kill()
            self._examiner.wait()
            self._examiner = None

    def _ready(self) -> socket.socket:
        """The control socket of an examiner that waits for a job."""
        if self._control is not None:
            return self._control
        control, theirs = socket.socketpair()
        for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # an incomplete message must not block this process
            control.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", int(VERDICT_S), 0))
        limits = replace(self._limits, memory_mb=EXAMINER_MB)
        read, write = os.pipe()
        try:
            with theirs:
                start = Start("examiner", limits, timed=False, forks=True)
                self._examiner = spawn(self._layer, start, stdin=theirs.fileno(), stdout=write, stderr=write)
        finally:
            os.close(write)
        output = Output(read, 2**20)
        try:
            message = self._receive(control, time.monotonic() + START_S, output)
            if message != {"ready": True}:
                _end(self._examiner, output)  # then its output is complete
        finally:
            output.close()
        if message != {"ready": True}:
            control.close()
            self._stop()
            said = " ".join(output.text.split())[-300:] or "it ended without output"
            raise SandboxError(f"sandbox: {self._layer.name} cannot start a process: {said}")
        self._control = control
        return control

    def _follow(self, control: socket.socket, output: Output, program: subprocess.Popen[bytes]) -> tuple[str, str]:
        """(reason, detail) of the job that was just sent; afterwards the examiner waits for the next job, or has
        ended."""
        seconds = self._limits.seconds
        message = self._receive(control, time.monotonic() + START_S, output)
        if message == {"started": True}:
            message = self._receive(control, time.monotonic() + seconds, output)
        cause = None
        if message is None:
            cause = ("output", f"more than {self._limits.output_kb} KiB") if output.full else None
            cause = cause or ("timeout", f"more than {seconds:g} s")
            _end(program, output)
            message = self._receive(control, time.monotonic() + VERDICT_S, None)
        verdict = message if isinstance(message, dict) and "reason" in message else None
        if verdict is not None:
            message = self._receive(control, time.monotonic() + VERDICT_S, None)
        if not (isinstance(message, dict) and "end" in message):
            self._stop()  # the tests themselves hang
        if cause is not None:
            return cause
        if verdict is None:
            return "tests", "the process of the tests has ended without a verdict"
        if verdict["reason"] == "died":
            return "died", _death(program) or verdict["detail"]
        return verdict["reason"], verdict["detail"]

    @staticmethod
    def _receive(control: socket.socket, deadline: float, output: Output | None) -> Any:
        """The examiner's next message; None if none arrives in time, or the program prints too much before it."""
        while (left := deadline - time.monotonic()) > 0:
            watched: list[Any] = [control, *([output] if output is not None and output.open else [])]
            ready, _, _ = select.select(watched, [], [], left)
            if control in ready:
                try:
                    return Channel(control.fileno()).receive()
                except WireError:
                    return None
            if output is not None and output in ready:
                output.take()
                if output.full:
                    return None
        return None


class Output:
    """A program's output: the first bytes are kept, the rest is counted."""

    def __init__(self, fd: int, most: int) -> None:
        self._fd = fd
        self._most = most
        self._kept = b""
        self._count = 0
        self.open = True

    def fileno(self) -> int:
        """For `select`."""
        return self._fd

    def take(self) -> None:
        """Read the available output."""
        part = os.read(self._fd, 2**16)
        self.open = bool(part)
        self._count += len(part)
        self._kept += part[: max(0, KEPT - len(self._kept))]

    @property
    def full(self) -> bool:
        """Whether it exceeds the limit."""
        return self._count > self._most

    @property
    def text(self) -> str:
        """The kept bytes as text."""
        return self._kept.decode(errors="replace")

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._fd)


def _end(program: subprocess.Popen[bytes], output: Output) -> None:
    """Kill a program, and wait until everything that held its output has ended."""
    program.kill()
    program.wait()
    deadline = time.monotonic() + END_S
    while output.open:
        ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise SandboxError("sandbox: a program could not be ended")
        output.take()


def _death(program: subprocess.Popen[bytes]) -> str:
    """How the process ended by itself, if it did."""
    try:
        code = program.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return ""
    number = code - 128 if code > 128 else -code
    if number > 0:
        with suppress(ValueError):
            return f"the process was ended by {signal.Signals(number).name}"
    return f"the process ended by itself, status {code}"
