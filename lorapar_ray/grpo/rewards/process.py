"""The parent's side of one reward process: starts it when needed, and ends it when it breaks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorapar_ray.errors import UserError
from lorapar_ray.redact import has_secret, redact

if TYPE_CHECKING:
    from lorapar_ray.config import SandboxConfig

MODULE = "lorapar_ray.grpo.rewards.worker"
READY = "ready"
"""The seal of the line in which a new process reports that it is ready, or the reason why not."""
START_LIMIT_S = 300.0
"""A new process imports the rewards' modules before it reports that it is ready; this time does not count for a
reward."""
END_LIMIT_S = 5.0
_SECRET = re.compile(
    r"KEY|TOKEN(?!IZERS)|SECRET|PASSW|(?:^|_)PASS(?:PHRASE)?$|(?<=_)(?:PWD|PAT)$|CREDENTIAL|AUTH(?!OR)|BEARER|COOKIE",
    re.IGNORECASE,
)
_JSON_KEY = re.compile(r'"([^"\\]+)"\s*:')


@dataclass(frozen=True)
class Reply:
    """Values of a call, or the cause and the text of its failure."""

    values: list[float | str | None] | None = None
    """`NOT_FINITE` for a value that is not a finite number; None for a sample that the reward does not apply to."""
    cause: str = ""
    error: str = ""


class RewardProcess:
    """Answers requests for some rewards; in the sandbox if `isolate`."""

    def __init__(
        self,
        rewards: Sequence[str],
        *,
        memory_limit_mb: int,
        sandbox: SandboxConfig,
        isolate: bool,
        withheld: Collection[str] = (),
    ) -> None:
        """The process starts with the first request; see `open_environment` for `withheld`."""
        self._withheld = withheld
        settings = {
            "memory_mb": memory_limit_mb,
            "rewards": list(rewards),
            "ready": READY,
            "sandbox": sandbox.model_dump(mode="json"),
            "guarded": not isolate,
        }
        self._arguments = [json.dumps(settings)]
        self._layer = sandbox.layer if isolate else None
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0

    def ask(self, request: dict[str, Any], count: int, time_limit_s: float) -> Reply:
        """A reward's values of `count` completions, or its failure, within `time_limit_s`.

        Raises:
            UserError: there is no such reward, it cannot be imported here, or this machine has no sandbox.
        """
        self._asked += 1
        seal = secrets.token_hex(16)
        try:
            process = self._ready()
            assert process.stdin is not None
            process.stdin.write(json.dumps({"number": self._asked, "seal": seal, **request}).encode() + b"\n")
            process.stdin.flush()
            line = _read_sealed(process, seal, time_limit_s)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.close()
            return Reply(cause="timeout", error=f"it takes longer than the time limit of {time_limit_s:g} s")
        if not line:
            self.close()
            return Reply(cause="crashed", error="its process ended")
        answer = json.loads(line)
        if answer["number"] != self._asked:
            self.close()  # an answer to another request
            return Reply(cause="crashed", error="its process answered out of order")
        values = answer.get("values")
        if values is None or len(values) != count:
            return Reply(cause=str(answer.get("cause", "raised")), error=str(answer.get("error")))
        return Reply(values)

    def close(self) -> None:
        """End the process and all processes that the rewards have started."""
        if self._process is not None:
            if self._layer is None:
                self._process.terminate()  # the guardian ends the rest
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(END_LIMIT_S)
            else:
                self._process.kill()
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
            said = _read_sealed(self._process, READY, START_LIMIT_S)
            if said and (problem := json.loads(said).get("error")):
                self.close()
                raise UserError(problem)
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        if self._layer is not None:
            from lorapar_ray.sandbox.hosting import host

            return host(MODULE, self._arguments, self._layer)
        command = [sys.executable, "-m", MODULE, *self._arguments]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, **pipes, start_new_session=True, env=open_environment(self._withheld))


def open_environment(withheld: Collection[str] = ()) -> dict[str, str]:
    """This process's environment without secrets: without variables with secret names (also within JSON), those that
    hold a known secret or a well-known service's key, and URLs with a password.

    Args:
        withheld: more variables to leave out, such as those that `api_key_env` names.
    """
    return {name: value for name, value in os.environ.items() if name not in withheld and not _is_secret(name, value)}


def _is_secret(name: str, value: str) -> bool:
    inside = any(map(_SECRET.search, _JSON_KEY.findall(value)))
    return bool(_SECRET.search(name)) or inside or has_secret(value) or redact(value) != value


def _read_sealed(process: subprocess.Popen[bytes], seal: str, limit: float) -> bytes:
    """The text after the seal on its line; b"" when the output ended. Other output is dropped.

    Raises:
        TimeoutError: no such line came within `limit` seconds.
    """
    assert process.stdout is not None
    deadline, mark, found = time.monotonic() + limit, b"\n" + seal.encode(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            if not (part := os.read(process.stdout.fileno(), 1 << 16)):
                return b""
            found += part
            before, sealed, line = found.partition(mark)
            if sealed and b"\n" in line:
                return line.partition(b"\n")[0]
            found = found if sealed else before[-len(mark) :]
