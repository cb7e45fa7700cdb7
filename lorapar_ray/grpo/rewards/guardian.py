"""The parent of a reward process: every process that the rewards have started ends with it.

It starts the process as its child and becomes the parent of every orphan below it. When the process ends, on SIGTERM,
or when its own parent has died, it kills all remaining processes. It cannot see processes that a reward has started
through a service or on another machine. If a reward deliberately kills its guardian, processes in a separate session
stay; `isolate: true` ends these too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
LOOK_S = 1.0
"""Seconds between two checks that its parent is alive."""


def guarded(work: Callable[[], None]) -> None:
    """Run `work` in a child process and return there; the caller's process becomes the guardian and ends by itself."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signals = {signal.SIGCHLD, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    parent, child = os.getppid(), os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        work()
        return
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # only the process holds its channel, so that its end is noticed at once
        os.dup2(null, stream)
    while os.getppid() == parent:
        found = signal.sigtimedwait(signals, LOOK_S)
        if (found is not None and found.si_signo == signal.SIGTERM) or _ended(child):
            break
    while descendants := _children(os.getpid()):
        for each in descendants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
    os._exit(0)


def _ended(child: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            if found == child:
                return True
    return False


def _children(process: int) -> list[int]:
    """Direct children; the orphans of killed ones become children in turn."""
    tasks = Path(f"/proc/{process}/task")
    try:
        return [
            int(each) for task in tasks.iterdir() for each in (task / "children").read_text(encoding="utf-8").split()
        ]
    except OSError:
        return []
