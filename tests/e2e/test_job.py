"""A real Ray job on a cluster started with `ray start --head` finishes a run that was labelled, scored and tuned.

Its stage 2 is graded by one of the labelling teachers, on Ray Serve.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lorapar_ray.pipeline import STAGES
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_interruption import copy_before
from tests.tiny_run import ROOT, metrics

pytestmark = pytest.mark.e2e
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_ray_job_submit_finishes_the_pipeline(finished: FinishedRun, tmp_path: Path) -> None:
    run = copy_before(finished, "grpo", tmp_path / "run")
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory(prefix="lorapar-job-", ignore_cleanup_errors=True) as temporary:
        start = [RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=3", "--block"]
        start += [f"--dashboard-port={dashboard}", f"--temp-dir={temporary}", "--disable-usage-stats"]
        start += [f"--dashboard-agent-listen-port={agent}"]  # another Ray on this machine has the default one
        head = subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert head.stdout is not None
            for line in head.stdout:
                if "--block" in line or "Ray runtime started" in line:
                    break
            submit = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", "."]
            submit += [
                "--",
                sys.executable,
                "jobs/pipeline.py",
                "--config",
                str(finished.config),
                "--run-dir",
                str(run),
                "--set",
                "grpo.rewards=[{name: judge}, {name: tests.e2e.rewards:letters}]",
                "--set",
                "grpo.judge.teachers=[a]",
            ]
            done = subprocess.run(submit, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000)
        finally:
            head.terminate()
            head.wait(60)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines = metrics(run, "grpo")
    assert len(lines) == 4 and all(0 < line["reward/judge"] < 1 and line["reward_failures"] == 0 for line in lines)
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert {name: stages[name]["status"] for name in STAGES} == dict.fromkeys(STAGES, "done")
