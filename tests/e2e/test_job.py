"""`lorapar submit` to a cluster of two nodes, a head without work and a worker, that wants a token: the job finishes a
run that was labelled, scored and tuned. Its stage 2 is graded by one of the labelling teachers, on Ray Serve."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

from lorapar_ray.pipeline import STAGES
from lorapar_ray.threads import meanwhile
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_interruption import copy_before
from tests.ports import free_port
from tests.tiny_run import ROOT, metrics
from tests.unit.test_dashboard import figures

pytestmark = pytest.mark.e2e
RAY = str(Path(sys.executable).with_name("ray"))


@contextmanager
def cluster(environment: dict[str, str], folder: str) -> Iterator[tuple[str, list[str]]]:
    """Two nodes with a token; yields the dashboard's address, and where Prometheus would read each node's metrics."""
    port, dashboard = free_port(), free_port()
    exporters: list[str] = []
    common = ["--disable-usage-stats", "--block", "--node-ip-address=127.0.0.1"]
    head = [RAY, "start", "--head", f"--port={port}", "--num-cpus=0", f"--dashboard-port={dashboard}"]
    worker = [RAY, "start", f"--address=127.0.0.1:{port}", "--num-cpus=3", "--labels=group=work"]
    nodes = []
    try:
        for start in ([*head, f"--temp-dir={folder}"], worker):
            agent = f"--dashboard-agent-listen-port={free_port()}"  # another Ray on this machine has the default one
            metrics_port = free_port()
            exporters.append(f"http://127.0.0.1:{metrics_port}/metrics")
            agent_options = [agent, f"--metrics-export-port={metrics_port}"]
            node = subprocess.Popen(
                [*start, *common, *agent_options], env=environment, stdout=subprocess.PIPE, text=True
            )
            nodes.append(node)
            assert node.stdout is not None
            for line in node.stdout:
                if "--block" in line or "Ray runtime started" in line:
                    break
        yield f"http://127.0.0.1:{dashboard}", exporters
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(60)


@contextmanager
def watched(exporters: list[str]) -> Iterator[set[str]]:
    """Collects our metrics like Prometheus while the block runs: `name figure` or `name work` of each."""
    seen: set[str] = set()

    def scrape() -> None:
        for place in exporters:
            with suppress(OSError), urlopen(place, timeout=5) as answer:
                text = answer.read().decode()
                found = re.findall(r'^ray_(lorapar_\w+)\{.*?(?:figure|work)="([^"]+)"', text, re.M)
                seen.update(" ".join(each) for each in found)

    with meanwhile(scrape, every_s=1.0):
        yield seen


def test_a_submitted_job_finishes_the_pipeline(finished: FinishedRun, tmp_path: Path) -> None:
    run = copy_before(finished, "grpo", tmp_path / "run")
    token = secrets.token_hex(32)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # the job says `python`
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "HOME": str(tmp_path)}
    environment["LORAPAR_CACHE"] = os.environ.get("LORAPAR_CACHE", str(Path("~/.cache/lorapar_ray").expanduser()))
    config = tmp_path / "sent" / "run.yaml"
    config.parent.mkdir()
    shutil.copy(finished.config, config)
    for part in ("lorapar_ray", "tests"):
        (config.parent / part).symlink_to(ROOT / part)
    rewards = "grpo.rewards=[{name: judge}, {name: tests.e2e.rewards:letters}]"

    def submit(address: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lorapar_ray.cli", "submit", str(config), "--run-dir", str(run)]
        command += ["--address", address, "--working-dir", str(config.parent), "--set", rewards]
        command += ["--set", "grpo.judge.teachers=[a]", "--set", "grpo.learner_resources.nodes.group=work"]
        command += ["--set", "grpo.steps=2", "--set", "evaluate.models=[grpo]", *options]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000)

    with (
        tempfile.TemporaryDirectory(prefix="lorapar-job-", ignore_cleanup_errors=True) as temporary,
        cluster(environment, temporary) as (address, exporters),
        watched(exporters) as seen,
    ):
        elsewhere = submit(address, "--set", "model.path=/no/such/model")
        first = submit(address, "--no-check", "--no-follow")
        done = submit(address)  # a running job is followed, so the nodes are not checked
    assert elsewhere.returncode == 2, elsewhere.stderr
    assert "✓ nodes        2 answer, 3 CPU, 0 GPU in all" in elsewhere.stdout
    assert "✓ storage" in elsewhere.stdout and "✗ models" in elsewhere.stdout
    assert re.search(
        r"cannot run this \(models: on [\d.]+: model '/no/such/model': no such directory", elsewhere.stderr
    )
    assert "INFO" not in elsewhere.stderr
    job = first.stdout.split()[1]
    assert first.returncode == 0 and first.stdout == f"submitted {job} at {address}\n"
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.startswith(f"following {job} at {address}\n")
    shown = {f"lorapar_grpo {figure}" for figure in figures("grpo")}
    assert shown | {"lorapar_done grpo", "lorapar_total evaluate"} <= seen, sorted(seen)
    assert token not in first.stdout + done.stdout + done.stderr
    assert "(raylet)" not in done.stdout, "Ray has no line in a good job's output"
    lines = metrics(run, "grpo")
    assert len(lines) == 2 and all(0 < line["reward/judge"] < 1 and line["reward_failures"] == 0 for line in lines)
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert {name: stages[name]["status"] for name in STAGES} == dict.fromkeys(STAGES, "done")
