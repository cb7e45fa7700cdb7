"""Which modules of an adapter an engine leaves out; with vLLM's own layers in tests/e2e/test_grpo_policy.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lorapar_ray.engines.served_adapter import not_served, unserved

QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]


def state_of(*modules: str) -> dict[str, Tensor]:
    return {f"base_model.model.{module}.lora_{part}.weight": torch.ones(1, 1) for module in modules for part in "AB"}


@pytest.fixture(scope="module")
def manager() -> SimpleNamespace:
    """Of a model's first pipeline stage: one layer, with experts; the second layer is another rank's."""
    from vllm.model_executor.models.utils import PPMissingLayer

    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), PPMissingLayer()])})})
    packed, experts = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.experts"
    layers = {packed: nn.Identity(), "model.layers.0.self_attn.o_proj": nn.Identity(), experts: nn.Identity()}
    return SimpleNamespace(model=model, modules=layers, packed_modules={packed: QKV})


@pytest.mark.parametrize(
    "served",
    [
        QKV,
        QKV[:1],
        ["model.layers.0.self_attn.o_proj"],
        ["model.layers.0.mlp.experts.base_layer"],
        ["model.layers.1.self_attn.o_proj"],
    ],
)
def test_modules_that_a_layer_or_another_rank_computes_with_are_served(
    manager: SimpleNamespace, served: list[str]
) -> None:
    assert unserved(manager, state_of(*served)) == []


@pytest.mark.parametrize(
    "other",
    ["model.language_model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.o_proj", "layers.0.self_attn.o_proj"],
)
def test_a_path_that_vllm_does_not_have_is_not_served(manager: SimpleNamespace, other: str) -> None:
    assert unserved(manager, state_of(*QKV, other)) == [other]


def test_the_clause_names_one_of_them_and_what_to_do() -> None:
    assert not_served([], 4) == ""
    line = not_served(["a.q_proj", "b.q_proj"], 4)
    assert "no LoRA layer for 2 of the adapter's 4 modules, for example 'a.q_proj'; serve it merged" in line
