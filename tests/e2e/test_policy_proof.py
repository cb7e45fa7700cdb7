"""The proof of the policy as a part of its own: plain vLLM, and TRL's GRPOTrainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.settings import engine_environment
from tests.tiny_run import ENGINE, ROOT, save_tiny_student

pytestmark = pytest.mark.e2e
WEIGHTS = "modules compute with other weights, most of all"


def test_the_page_runs_and_lost_steps_are_caught_also_in_trl(tmp_path: Path) -> None:
    student = save_tiny_student(tmp_path / "student")
    environment = engine_environment(EngineConfig(**ENGINE), Resources(threads=2))
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.policy_proof", str(student), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["answer"] == 16
    assert max(found["gap"], found["TRL: gap"]) < 1e-3
    assert "ranks loaded different policies" in found["a lost step of 0.1"]
    for name in ("a lost step of 1e-7", "TRL: a lost step"):
        assert WEIGHTS in found[name] and "the engine does not serve policy" in found[name], name
    assert found["after it"] == found["a directory"] == ""
    assert "canary tokens are" in found["the trainer moved on"]
    assert found["TRL: digests"] == 4  # before the first step, and after each of three
    assert len(found["TRL: logged"]) == 3 and max(found["TRL: logged"]) < 1e-3
