"""Tests of Triton kernels: on a GPU directly, elsewhere in Triton's interpreter.

The process that first imports Triton sets the interpreter, so these tests run in a separate process.
"""

import os
import subprocess
import sys

import pytest
import torch

from lorapar_ray.optim.triton_step import has_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
kernels = pytest.mark.skipif(False, reason="interpreted here") if INTERPRETED else pytest.mark.gpu
"""On a GPU, or by `run_interpreted` in a process that interprets."""


def run_interpreted(file: str) -> None:
    """Run a file's tests in a process that interprets, and expect them to pass."""
    if INTERPRETED or not has_triton():
        pytest.skip("this is the process that interprets" if INTERPRETED else "Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout, done.stdout
