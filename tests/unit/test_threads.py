"""Ending a command from one of its threads."""

import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("waiting", ["time.sleep(60)", "lock.acquire()", "Future().result()"])
def test_a_command_can_be_ended_from_a_thread_whatever_it_waits_for(waiting: str, ignored: bool) -> None:
    """Also one that ignores Ctrl-C, as scripts start their background commands."""
    action = "SIG_IGN" if ignored else "default_int_handler"
    code = f"""
import signal, time
from concurrent.futures import Future
from threading import Lock, Timer
from lorapar_ray.threads import stop_this_command
signal.signal(signal.SIGINT, signal.{action})
Timer(0.5, stop_this_command).start()
lock = Lock()
lock.acquire()
{waiting}
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=50, check=False, stderr=subprocess.DEVNULL)
    assert ended.returncode == -(signal.SIGTERM if ignored else signal.SIGINT)
