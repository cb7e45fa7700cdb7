"""How policies are written into vLLM's models; test_grpo_policy.py tests what engines serve afterwards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import ROOT, save_tiny_student

pytestmark = pytest.mark.e2e


def test_a_policy_is_written_into_the_tensors_that_cuda_graphs_captured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.e2e.vllm_in_place", str(save_tiny_student(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    adapted = ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.qkv_proj")
    assert found == {
        "plain on a GPU": True,
        "plain on a CPU": False,
        "same storage": True,
        "merged": True,
        "modules": [f"model.layers.{layer}.{name}" for layer in range(2) for name in adapted],
        "a part is missing": "the engine's weights are not those of the policy after it was loaded",
    }
