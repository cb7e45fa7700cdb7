"""A run on a cluster of two nodes, a head without work and a worker, that wants a token: each stage is made by its own
file of `jobs/`, as a Ray job, and `lorapar submit` replaces one. Stage 2 is graded by a teacher, on Ray Serve."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from urllib.request import urlopen

import pytest

from lorapar_ray.pipeline import STAGES
from lorapar_ray.threads import meanwhile
from tests.e2e.clusters import environment_of, job_cluster, link_sources, new_token
from tests.e2e.twin import is_done
from tests.tiny_run import ROOT, metrics, save_tiny_student, tiny_config, write_config
from tests.unit.test_dashboard import figures

pytestmark = pytest.mark.e2e
NODES = (["--num-cpus=0"], ["--num-cpus=3", "--labels=group=work"])


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


def config_of(student: Path) -> dict[str, object]:
    """Labels without engines, which other tests start by the dozen; stage 2 with two kinds of reward."""
    config = tiny_config(student)
    config["label"] |= {"strategy": "random"}
    config["sft"] |= {"epochs": 2}
    config["grpo"] |= {
        "steps": 2,
        "rewards": [{"name": "judge"}, {"name": "tests.e2e.rewards:letters"}],
        "judge": {"teachers": ["a"]},
        "learner_resources": {"nodes": {"group": "work"}},
    }
    config["evaluate"] |= {"models": ["grpo"]}
    return config


def test_every_stage_as_a_job(tmp_path: Path) -> None:
    run, token = tmp_path / "run", new_token()
    environment = environment_of(token, tmp_path)
    folder = link_sources(tmp_path / "sent")
    config = write_config(folder / "run.yaml", config_of(save_tiny_student(tmp_path / "student")))
    said: list[str] = []

    def submit(address: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lorapar_ray.cli", "submit", str(config), "--run-dir", str(run)]
        command += ["--address", address, "--working-dir", str(folder), *options]
        own = {**environment, "WANDB_API_KEY": "a" * 40}  # the nodes have none
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=1000)
        said.append(done.stdout + done.stderr)
        return done

    with job_cluster(NODES, environment) as cluster, watched(cluster.exporters) as seen:
        (folder / "wandb").mkdir()  # stands for an installed client
        (folder / "wandb" / "__init__.py").touch()
        elsewhere = submit(cluster.address, "--set", "model.path=/no/such/model", "--set", "sft.report_to=[wandb]")
        rmtree(folder / "wandb")
        for stage in STAGES:
            job = cluster.submit(folder, "python", f"jobs/{stage}.py", "--config", "run.yaml", "--run-dir", run)
            status, log = cluster.wait(job)
            said.append(log)
            assert status == "SUCCEEDED", f"{stage}: {log[-3000:]}"
            assert is_done(run, stage) and not any(is_done(run, each) for each in STAGES[STAGES.index(stage) + 1 :])
        adapter = (run / "sft/adapter/adapter_model.safetensors").read_bytes()
        first = submit(cluster.address, "--redo", "sft", "--no-check", "--no-follow")
        done = submit(cluster.address)  # a running job is followed, so the nodes are not checked
    assert elsewhere.returncode == 2, elsewhere.stderr
    assert "✓ nodes        2 answer, 3 CPU, 0 GPU in all" in elsewhere.stdout
    assert "✓ storage" in elsewhere.stdout and "✗ models" in elsewhere.stdout
    assert "✗ trackers     sft.report_to: wandb has no key for api.wandb.ai; set WANDB_API_KEY" in elsewhere.stdout
    assert re.search(
        r"cannot run this \(models: on [\d.]+: model '/no/such/model': no such directory", elsewhere.stderr
    )
    assert "INFO" not in elsewhere.stderr
    job = first.stdout.split()[1]
    assert first.returncode == 0 and first.stdout == f"submitted {job} at {cluster.address}\n"
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.startswith(f"following {job} at {cluster.address}\n")
    assert "✓ score: done" in done.stdout and "✓ grpo: done" in done.stdout and "✓ sft: done" not in done.stdout
    assert (run / "sft/adapter/adapter_model.safetensors").read_bytes() == adapter
    shown = {f"lorapar_grpo {figure}" for figure in figures("grpo")}
    assert shown | {"lorapar_done grpo", "lorapar_total evaluate"} <= seen, sorted(seen)
    assert not any(token in each for each in said)
    assert not any("(raylet)" in each for each in said[1:]), "Ray has no line in a good job's output"
    lines = metrics(run, "grpo")
    assert len(lines) == 2 and all(0 < line["reward/judge"] < 1 and line["reward_failures"] == 0 for line in lines)
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert {name: stages[name]["status"] for name in STAGES} == dict.fromkeys(STAGES, "done")
