"""Targets, inits, files and export of adapters, on real architectures with random weights."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from lorapar_ray.adapters import (
    adapter_parameters,
    adapter_state,
    attach_lora,
    layer_index,
    load_adapter,
    lora_scaling,
    matrix,
    merged_weights,
    module_type,
    read_adapter_state,
    resolve_targets,
    save_adapter,
    to_plain_lora,
)
from lorapar_ray.adapters.job import initialise, require_lora
from lorapar_ray.config import AdapterConfig, ModelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.student import RESIDUAL_INITS, load_base
from tests.unit.tiny_models import CONFIGS, tiny

TOKENS = torch.arange(3, 19).view(2, 8)


def randomise(model: torch.nn.Module) -> None:
    """Set B to nonzero values, so that the adapter has an effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_qkv_and_gud_are_found_in_every_family(family: str) -> None:
    model = tiny(family)
    types = {module_type(name) for name in resolve_targets(model, "qkvgud")}
    attention = {"phi3": {"qkv"}, "gpt_neox": {"qkv"}}.get(family, {"q", "k", "v"})
    mlp = {"phi3": {"gate_up", "down"}, "gpt_neox": {"up", "down"}, "mixtral": set()}.get(
        family, {"gate", "up", "down"}
    )
    assert types == attention | mlp
    assert {module_type(name) for name in resolve_targets(model, "qkv")} == attention


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_packed_experts_are_left_out_with_a_warning(family: str) -> None:
    model = tiny(family)
    with pytest.warns(UserWarning, match=r"4 tensors of .* hold packed experts and get no adapter"):
        resolve_targets(model, "qkvgud")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_targets(model, "qkv")


def test_a_model_without_the_targets_is_refused_with_the_layers_it_has() -> None:
    with pytest.raises(UserError, match=r"'w_missing' matches no layer of LlamaForCausalLM.*down_proj"):
        resolve_targets(tiny(), ["w_missing"])


def test_keys_tell_layer_module_and_matrix() -> None:
    key = "base_model.model.model.layers.11.self_attn.q_proj.lora_A.weight"
    assert (layer_index(key), module_type(key), matrix(key)) == (11, "q", "A")


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora"])
def test_inits_are_seeded_float32_and_leave_the_function_alone(init: str) -> None:
    before = tiny()(TOKENS).logits
    first, again = (attach_lora(tiny(), rank=4, alpha=8, init=init, seed=5) for _ in range(2))
    states = adapter_state(first), adapter_state(again)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(value.dtype == torch.float32 for value in states[0].values())
    zero_b = all(not value.any() for key, value in states[0].items() if matrix(key) == "B")
    assert zero_b == (init == "default")
    if init != "gaussian":
        torch.testing.assert_close(first(TOKENS).logits, before, atol=2e-5, rtol=1e-4)


def test_a_bfloat16_base_keeps_float32_adapters() -> None:
    model = attach_lora(tiny().to(torch.bfloat16), rank=4, alpha=8)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)


def test_saved_adapters_load_in_stock_peft_with_the_same_logits(tmp_path: Path) -> None:
    model = attach_lora(tiny(), rank=4, alpha=8)
    randomise(model)
    expected = model(TOKENS).logits
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter"))(TOKENS).logits, expected)
    ours = load_adapter(tiny(), tmp_path / "adapter")
    assert torch.equal(ours(TOKENS).logits, expected)
    assert any(p.requires_grad for p in ours.parameters())


def test_merged_weights_equal_pefts(tmp_path: Path) -> None:
    base = tiny()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = attach_lora(base, rank=4, alpha=8)
    randomise(model)
    merged = dict(merged_weights(weights, adapter_state(model), scaling=2.0, dtype=torch.float32))
    theirs = model.merge_and_unload().state_dict()
    assert len(merged) == 12
    for name, value in merged.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_inits_export_as_plain_lora_on_the_original_base(init: str, tmp_path: Path) -> None:
    model = attach_lora(tiny(), rank=4, alpha=8, init=init)
    initial = adapter_state(model)
    randomise(model)
    save_adapter(model, tmp_path / "trained")
    settings = {"r": 4, "lora_alpha": 8}
    state, plain = to_plain_lora(initial, read_adapter_state(tmp_path / "trained"), settings)
    original = tiny()
    weights = dict(merged_weights(original.state_dict(), state, scaling=lora_scaling(plain), dtype=torch.float32))
    original.load_state_dict({**original.state_dict(), **weights})
    torch.testing.assert_close(original(TOKENS).logits, model(TOKENS).logits, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora"])
def test_an_adapter_is_made_with_the_base_it_belongs_to(init: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    words = Tokenizer(WordLevel({"[PAD]": 0, "a": 1}, unk_token="[PAD]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path / "base")
    settings = AdapterConfig(init=init, rank=4, alpha=8).model_dump(mode="json")
    model = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    made, residual = tmp_path / "adapter", init in RESIDUAL_INITS
    assert initialise(model.model_dump(mode="json"), settings, str(tmp_path / "base"), str(made), seed=0) is None
    assert (made / "base").is_dir() == residual
    whole = load_adapter(load_base(model, str((made if residual else tmp_path) / "base")), made)
    if residual:
        torch.testing.assert_close(whole(TOKENS).logits, tiny()(TOKENS).logits, atol=2e-5, rtol=1e-4)


def test_an_adapter_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    model = attach_lora(tiny(), rank=4, alpha=8)
    save_adapter(model, tmp_path / "adapter")
    state = read_adapter_state(tmp_path / "adapter")
    state.pop(min(state))
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing"), pytest.raises(UserError, match="lacks 1 tensors"):
        load_adapter(tiny(), tmp_path / "adapter")


def test_training_continues_from_the_users_adapter(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    trained = attach_lora(tiny(), rank=4, alpha=32, targets="qkv")
    randomise(trained)
    save_adapter(trained, tmp_path / "theirs")
    settings = AdapterConfig(init="adapter", path=str(tmp_path / "theirs")).model_dump(mode="json")
    model = ModelConfig(path=str(tmp_path / "base"), dtype="float32").model_dump(mode="json")
    assert initialise(model, settings, str(tmp_path / "base"), str(tmp_path / "ours"), seed=0) is None
    ours, theirs = read_adapter_state(tmp_path / "ours"), adapter_state(trained)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    require_lora(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"adapter.path '.*base': needs adapter_config.json"):
        require_lora(tmp_path / "base")
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    with pytest.raises(UserError, match="holds a IA3 adapter"):
        require_lora(tmp_path / "theirs")


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_seed_draws_the_same_adapter_on_every_device(init: str) -> None:
    """Another device's generator would give other numbers. Where they are drawn is seen on the device `meta`."""
    drawn: list[torch.device] = []

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.Tag.nondeterministic_seeded in function.tags:
                drawn.extend(each.device for each in args if isinstance(each, torch.Tensor))
            return function(*args, **(kwargs or {}))

    model = tiny("llama").to("meta")
    with Draws():
        attach_lora(model, rank=4, alpha=8, init=init)
    assert drawn and {each.type for each in drawn} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_gpu_has_the_adapter_of_a_cpu(init: str) -> None:
    here, there = (
        adapter_state(attach_lora(tiny("llama").to(device), rank=4, alpha=8, init=init)) for device in ("cpu", "cuda")
    )
    assert all(torch.equal(value, there[key].cpu()) for key, value in here.items())


def test_an_adapter_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    model = attach_lora(tiny(), rank=2, alpha=4)
    key, value = next(iter(adapter_parameters(model).items()))
    with torch.no_grad():
        value.view(-1)[1] = torch.nan
    with pytest.raises(UserError, match=f"is not written: '{re.escape(key)}' holds numbers that are not finite"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
