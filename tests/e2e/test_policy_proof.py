"""The proof of the policy as a part of its own: plain vLLM, and TRL's GRPOTrainer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.settings import engine_environment
from tests.tiny_run import ENGINE, ROOT

pytestmark = pytest.mark.e2e
WEIGHTS = "modules compute with other weights, most of all"
UNKNOWN = "vLLM's model has no LoRA layer for 14 of the adapter's 14 modules"


def found_by(script: str, *arguments: str, gpus: int = 0) -> dict[str, Any]:
    """What a script of this folder prints, in the environment of an engine on a CPU, or on GPUs."""
    environment = engine_environment(EngineConfig(**ENGINE), Resources(threads=1, gpus=gpus))
    command = [sys.executable, "-m", f"tests.e2e.{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def found(student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("policy_proof", str(student), str(tmp_path_factory.mktemp("proof")))


def test_a_policy_is_written_into_the_tensors_that_cuda_graphs_captured(found: dict[str, Any]) -> None:
    """What engines serve afterwards is tested in test_grpo_policy.py."""
    adapted = ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.qkv_proj")
    assert found["in place"] == {
        "plain on a GPU": True,
        "plain on a CPU": False,
        "same storage": True,
        "merged": True,
        "modules": [f"model.layers.{layer}.{name}" for layer in range(2) for name in adapted],
        "a part is missing": "the engine's weights are not those of the policy after it was loaded",
    }


def test_the_page_runs_and_lost_steps_are_caught_also_in_trl(found: dict[str, Any]) -> None:
    assert found["answer"] == 16
    assert max(found["gap"], found["TRL: gap"]) < 1e-3
    assert "ranks loaded different policies" in found["a lost step of 0.1"]
    for name in ("a lost step of 1e-7", "TRL: a lost step"):
        assert WEIGHTS in found[name] and "the engine does not serve policy" in found[name], name
    assert found["after it"] == found["a directory"] == ""
    for name in ("the trainer moved on", "a model that came after the first policy"):
        assert "canary tokens are" in found[name], name
    assert found["TRL: digests"] == 4  # before the first step, and after each of three
    assert (found["TRL: a chat"], found["TRL: tokens"]) == ("5 + 7 add", 3)
    assert len(found["TRL: logged"]) == 3 and max(found["TRL: logged"]) < 1e-3


@pytest.mark.long
@pytest.mark.parametrize("max_lora_rank", [0, 8])
def test_every_tensor_parallel_rank_is_verified(student: Path, tmp_path: Path, max_lora_rank: int) -> None:
    """Each rank holds a part of every module, of the keys and values a copy; rank 1 misses one policy."""
    fault = tmp_path / "fault"
    found = found_by("tensor_parallel_proof", str(student), str(fault), str(max_lora_rank), "2", "float32")
    assert len(found["gaps"]) == 3 and max(found["gaps"]) < 1e-3
    [line] = found["refused"]
    modules = "8 of 8" if max_lora_rank else "14 of 14"
    assert f"policy 2: on its rank 1, {modules} modules compute with other weights" in line
    if max_lora_rank:
        assert f"on its rank 0, {UNKNOWN}" in found["names"][0]


@pytest.mark.gpu
@pytest.mark.parametrize("max_lora_rank", [0, 8])
def test_an_engine_on_a_gpu_serves_each_policy_and_a_lost_one_is_caught(
    student: Path, tmp_path: Path, max_lora_rank: int
) -> None:
    """Merged into the tensors that CUDA graphs captured, and as a LoRA adapter."""
    fault = tmp_path / "fault"
    found = found_by("tensor_parallel_proof", str(student), str(fault), str(max_lora_rank), "1", "bfloat16", gpus=1)
    assert len(found["gaps"]) == 3 and max(found["gaps"]) < 0.2
    [line] = found["refused"]
    assert f"policy 2: {'8 of 8' if max_lora_rank else '14 of 14'} {WEIGHTS}" in line
    if max_lora_rank:
        assert UNKNOWN in found["names"][0]
