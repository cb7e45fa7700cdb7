"""One reward process, seen from outside: started when asked, ended when it breaks."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorapar_ray.errors import UserError

if TYPE_CHECKING:
    from lorapar_ray.config import SandboxConfig

MODULE = "lorapar_ray.grpo.rewards.worker"
START_LIMIT_S = 300.0
"""A fresh process imports the rewards' modules before it says it is ready; that is not a reward's own time."""


class RewardProcess:
    """Answers requests for some rewards; in the sandbox if `isolate`."""

    def __init__(
        self,
        rewards: Sequence[str],
        *,
        time_limit_s: float,
        memory_limit_mb: int,
        sandbox: SandboxConfig,
        isolate: bool,
    ) -> None:
        """The process starts with the first request."""
        self._time_limit_s = time_limit_s
        settings = {
            "memory_mb": memory_limit_mb,
            "time_limit_s": time_limit_s,
            "rewards": list(rewards),
            "sandbox": sandbox.model_dump(mode="json"),
        }
        self._arguments = [json.dumps(settings)]
        self._layer = sandbox.layer if isolate else None
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0

    def ask(self, request: dict[str, Any], count: int) -> tuple[list[float | None] | None, str]:
        """(values, "") or (None, cause).

        Raises:
            UserError: there is no such reward, it cannot be imported here, or this machine has no sandbox.
        """
        self._asked += 1
        request = {"number": self._asked, **request}
        try:
            process = self._ready()
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process, self._time_limit_s)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.close()
            return None, "timeout"
        if not line:
            self.close()
            return None, "crashed"
        answer = json.loads(line)
        if answer["number"] != self._asked:
            self.close()  # an answer to something else
            return None, "crashed"
        values = answer.get("values")
        if values is None or len(values) != count:
            return None, "raised"
        return values, ""

    def close(self) -> None:
        """End the process, and with it whatever the rewards have started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
            self._process = None

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._start()
            said = _read_line(self._process, START_LIMIT_S)
            if said and json.loads(said) != "ready":
                self.close()
                raise UserError(json.loads(said)["error"])
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        if self._layer is not None:
            from lorapar_ray.sandbox.hosting import host

            return host(MODULE, self._arguments, self._layer)
        command = [sys.executable, "-m", MODULE, *self._arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def _read_line(process: subprocess.Popen[bytes], limit: float) -> bytes:
    """The next line of the process's output, or b"" when it ended; TimeoutError after `limit` seconds."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        deadline = time.monotonic() + limit
        if not selector.select(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
    return process.stdout.readline()
