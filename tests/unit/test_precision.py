"""How `dtype: auto` is resolved, with the CPU's ability set by the test."""

import pytest
import torch

from lorapar_ray import precision
from lorapar_ray.config import EngineConfig
from lorapar_ray.config_file import load_config
from lorapar_ray.engines.settings import engine_arguments, platform_arguments
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.precision import engine_dtype, require_trainable, torch_dtype
from lorapar_ray.sft.arm import Worker
from tests.tiny_run import ROOT

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_what_the_cpu_can_multiply(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: native)
    assert torch_dtype("auto", CPU) == expected
    assert engine_dtype() == str(expected).removeprefix("torch.")
    assert torch_dtype("bfloat16", CPU) == torch.bfloat16


def test_an_engine_takes_the_dtype_it_is_told_and_else_the_machines() -> None:
    def dtype(engine: EngineConfig) -> str:
        merged = {**platform_arguments(), **engine_arguments("m", engine, seed=0, trust_remote_code=False)}
        return str(merged["dtype"])

    assert dtype(EngineConfig(dtype="float16")) == "float16"
    assert dtype(EngineConfig()) == engine_dtype()


def test_float16_is_refused_before_anything_trains() -> None:
    """An engine may compute in it; a gradient would mostly be 0."""
    config = load_config(ROOT / "jobs" / "configs" / "arithmetic-grpo.yaml", ["model.dtype=float16"])
    for stage in ("score", "sft", "grpo"):
        with pytest.raises(UserError, match=r"model\.dtype: float16 has too small a range"):
            PIPELINE[stage].check(config)
    PIPELINE["evaluate"].check(config)
    for dtype in ("auto", "bfloat16", "float32"):
        require_trainable(dtype)


def test_workers_draw_different_dropout_masks() -> None:
    seeds = {Worker(rank, 8, torch.device("cpu")).seed(seed) for rank in range(8) for seed in range(4)}
    assert len(seeds) == 32
