"""A model that vLLM cannot load, and settings it cannot start with, are one line that names the field."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import ROOT, save_tiny_student

pytestmark = pytest.mark.e2e


def test_engines_that_cannot_start(tmp_path: Path) -> None:
    model = save_tiny_student(tmp_path / "m")
    command = [sys.executable, "-m", "tests.e2e.engines_that_cannot_start", str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {  # the line's beginning, and the cause in it
        "architecture": ("model '", "architectures ['NobodysForCausalLM'] are not supported"),
        "head size": ("model '", "head_dim 16: vLLM on a CPU knows 32, 64"),
        "cut weights": ("model '", "SafetensorError"),
        "longer than the model": ("evaluate.engine.max_model_len: ", "max_model_len (4096) is greater"),
        "unknown argument": ("evaluate.engine.extra: ", "unexpected keyword argument 'nonsense'"),
        "cache": ("evaluate.engine.kv_cache_gib: ", "GiB KV cache is needed"),
        "batched tokens": ("evaluate.engine.extra.max_num_batched_tokens: ", "is smaller than max_model_len"),
    }
    assert set(found) == set(expected)
    for case, (begin, cause) in expected.items():
        assert found[case].startswith(begin) and cause in found[case] and "\n" not in found[case], found[case]
        assert f"'{model} {case}'" in found[case]
