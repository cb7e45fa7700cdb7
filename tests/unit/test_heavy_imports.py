"""What an import leaves out is not needed, and what it puts off happens later."""

import json
import subprocess
import sys
from functools import partial
from typing import Any

import pytest

from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.heavy_imports import _compiled_when_called, is_ray_worker
from lorapar_ray.models import resolve_model
from tests.tiny_run import ROOT

QUESTION = "What is 2 + 3, naïvely?"
WITHOUT_TORCH = """
import json, sys
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.heavy_imports import leave_out_torch
leave_out_torch()
encoder = load_encoder(sys.argv[1], None)
print(json.dumps([encoder.prompt_ids(sys.argv[2]), encoder.end_ids, "torch" in sys.modules]))
"""


@pytest.mark.slow
def test_a_tokenizer_without_torch_gives_the_same_tokens() -> None:
    model = resolve_model("package:smollm2-135m-instruct")
    command = [sys.executable, "-c", WITHOUT_TORCH, model, QUESTION]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    encoder = load_encoder(model, None)
    assert json.loads(done.stdout) == [encoder.prompt_ids(QUESTION), encoder.end_ids, False]
    assert done.stderr == ""
    assert not is_ray_worker()  # in this process, where torch is wanted


def test_functions_are_compiled_once_and_only_when_called() -> None:
    compiled: list[dict[str, Any]] = []

    def compiler(function: Any, **how: Any) -> Any:
        compiled.append(how)
        return lambda value: function(value) + 100

    torch_compile = partial(_compiled_when_called, compiler)

    @torch_compile
    def plain(value: int) -> int:
        return value + 1

    @torch_compile(dynamic=False)
    def with_options(value: int) -> int:
        """Doubles."""
        return 2 * value

    assert compiled == [] and with_options.__doc__ == "Doubles."
    assert (plain(1), plain(2), with_options(3)) == (102, 103, 106)
    assert compiled == [{}, {"dynamic": False}]
