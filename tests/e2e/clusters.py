"""Ray clusters of this machine that want a token and take jobs, as `cluster/compose.yaml` starts them."""

import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray.job_submission import JobSubmissionClient

from lorapar_ray.job_log import JobLog, followed
from lorapar_ray.session import START_TRIES
from tests.ports import free_port
from tests.tiny_run import ROOT

RAY = str(Path(sys.executable).with_name("ray"))
SENT = ("jobs", "lorapar_ray", "tests")
STARTED = re.compile(r"--block|Ray runtime started")


def environment_of(token: str, home: Path) -> dict[str, str]:
    """Of a cluster's nodes and of a machine that submits to it, whose home has no token; a job says `python`."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    found["PATH"] = f"{Path(sys.executable).parent}:{found['PATH']}"
    found["LORAPAR_CACHE"] = os.environ.get("LORAPAR_CACHE", str(Path("~/.cache/lorapar_ray").expanduser()))
    return found | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "HOME": str(home)}


def link_sources(folder: Path) -> Path:
    """Give a working directory what jobs need of this one."""
    folder.mkdir(exist_ok=True)
    for part in SENT:
        (folder / part).symlink_to(ROOT / part)
    return folder


class JobCluster:
    """Its nodes are processes of this machine."""

    def __init__(
        self, nodes: Sequence[Sequence[str]], environment: dict[str, str], folder: str, port: int | None = None
    ) -> None:
        """Start them.

        Args:
            nodes: more options of `ray start`, for the head and for each other node.
            environment: see `environment_of`.
            folder: for Ray's files, with a short path.
            port: of the head; None: any.
        """
        port, dashboard = port or free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.exporters: list[str] = []
        """Where Prometheus would read each node's metrics."""
        self._token = environment["RAY_AUTH_TOKEN"]
        self._nodes: list[subprocess.Popen[str]] = []
        first = ["--head", f"--port={port}", f"--dashboard-port={dashboard}"]
        try:
            for number, options in enumerate(nodes):
                # each has its own folder, as on machines: a node unpacks a job's files anew, over those that are there
                place = [*(first if number == 0 else [f"--address=127.0.0.1:{port}"]), f"--temp-dir={folder}/{number}"]
                self._start([*place, *options], environment)
        except BaseException:
            self.kill()
            raise

    def _start(self, options: list[str], environment: dict[str, str]) -> None:
        metrics = free_port()
        self.exporters.append(f"http://127.0.0.1:{metrics}/metrics")
        common = ["--disable-usage-stats", "--block", "--node-ip-address=127.0.0.1", f"--metrics-export-port={metrics}"]
        agent = f"--dashboard-agent-listen-port={free_port()}"  # another Ray on this machine has the default one
        command = [RAY, "start", *options, *common, agent]
        for _ in range(START_TRIES):  # on a busy machine Ray gives up after half a minute
            node = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            self._nodes.append(node)
            assert node.stdout is not None
            if any(STARTED.search(line) for line in node.stdout):
                return
        raise AssertionError(f"{' '.join(command)} has ended")

    @property
    def client(self) -> JobSubmissionClient:
        """Ray's own client of its job server."""
        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self._token}"})

    def submit(self, folder: Path | None, *command: str | Path, job: str | None = None) -> str:
        """Send a folder, if any, and run a command in it; returns the job's submission id, `job` if that is given."""
        sent: dict[str, Any] = {} if folder is None else {"working_dir": str(folder), "excludes": ["**/__pycache__"]}
        entry = " ".join(map(str, command))
        return str(self.client.submit_job(entrypoint=entry, submission_id=job, runtime_env=sent))

    def wait(self, job: str) -> tuple[str, str]:
        """A job's status once it has ended, and its log."""
        lines: list[str] = []
        ended = followed(self.client, job, JobLog(lines.append))
        return ended.status.value, "\n".join(lines)

    def kill(self) -> None:
        """`kill -9` to all of it at the same moment, as if its machines lost their power."""
        found: set[psutil.Process] = set()
        while True:
            more = self._processes() - found
            if not more:
                break
            for process in more:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()  # so that nothing of it sees another part's end, or starts a process
            found |= more
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self._nodes:
            node.wait(60)
        psutil.wait_procs(found, timeout=60)

    def _processes(self) -> set[psutil.Process]:
        found: set[psutil.Process] = set()
        for node in self._nodes:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(node.pid)
                found |= {root, *root.children(recursive=True)}
        return found


@contextmanager
def job_cluster(
    nodes: Sequence[Sequence[str]], environment: dict[str, str], port: int | None = None
) -> Iterator[JobCluster]:
    """A cluster that ends with the block, unless it was killed before."""
    with tempfile.TemporaryDirectory(prefix="lorapar-job-", ignore_cleanup_errors=True) as folder:
        cluster = JobCluster(nodes, environment, folder, port)
        try:
            yield cluster
        finally:
            cluster.kill()


def new_token() -> str:
    """As an operator makes one for a cluster."""
    return secrets.token_hex(32)
