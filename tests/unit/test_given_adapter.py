"""The user's LoRA: the run computes the same as stock PEFT, or one line gives the reason why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorapar_ray.adapters import lora_scaling, merged_weights
from lorapar_ray.adapters.given import LARGEST_GAP, require_lora, take_over
from lorapar_ray.adapters.store import CONFIG, WEIGHTS
from lorapar_ray.errors import UserError
from tests.unit.tiny_models import GROUPED

TOKENS = torch.arange(3, 27).reshape(2, 12)


def base(tied: bool = True, **shape: int) -> Any:
    torch.manual_seed(0)
    settings = {**GROUPED, **shape}
    return LlamaForCausalLM(LlamaConfig(**settings, attention_bias=True, tie_word_embeddings=tied)).eval()


def given(folder: Path, model: Any = None, embeddings: bool | str = "auto", **options: Any) -> Path:
    """An adapter from a user's script, with every element changed by training."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **options}
    adapted = get_peft_model(model or base(), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj", "lora_dropout": 0.3},
        {"init_lora_weights": "gaussian", "lora_alpha": 3},
    ],
    ids=str,
)
def test_an_accepted_adapter_computes_the_same_in_stock_peft_and_merged(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs, ours = given(tmp_path / "theirs", **options), tmp_path / "ours"
    require_lora(theirs)
    assert take_over(base(), theirs, ours, "m") == 0
    wanted = PeftModel.from_pretrained(base(), str(theirs)).eval()(TOKENS).logits
    assert not torch.allclose(wanted, base()(TOKENS).logits, atol=0.01)
    assert torch.equal(PeftModel.from_pretrained(base(), str(ours)).eval()(TOKENS).logits, wanted)
    engine = base()
    scaling = lora_scaling(json.loads((ours / CONFIG).read_text()))
    merged = dict(merged_weights(engine.state_dict(), load_file(ours / WEIGHTS), scaling=scaling, dtype=torch.float32))
    engine.load_state_dict({**engine.state_dict(), **merged})
    torch.testing.assert_close(engine(TOKENS).logits, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"bias": "lora_only"}, "has bias"),
        ({"lora_bias": True}, "has lora_bias"),
        ({"use_dora": True}, "has use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "has alpha_pattern"),
        ({"modules_to_save": ["norm"]}, "has modules_to_save"),
        ({"trainable_token_indices": [7, 8]}, "has trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_the_run_would_compute_differently_is_refused(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    theirs = given(tmp_path / "theirs", **options)
    with pytest.raises(UserError, match=f"adapter.path '.*theirs'.*{why}"):
        require_lora(theirs)
        take_over(base(), theirs, tmp_path / "ours", "m")
    assert not (tmp_path / "ours").exists()


def test_a_tied_output_layer_is_refused_however_it_was_saved(tmp_path: Path) -> None:
    untied = given(tmp_path / "theirs", base(tied=False), embeddings=False, target_modules=["q_proj", "lm_head"])
    require_lora(untied)
    assert take_over(base(tied=False), untied, tmp_path / "untied", "m") == 0
    with pytest.raises(UserError, match=r"adapts 'lm_head\.weight', which model.path 'm' shares"):
        take_over(base(), untied, tmp_path / "ours", "m")


def test_the_round_trip_catches_unknown_settings(tmp_path: Path) -> None:
    """A setting that changes the base may have a name that this code does not know."""
    theirs = given(tmp_path / "theirs", init_lora_weights="pissa")
    with pytest.raises(UserError, match="PEFT changes the base when it loads"):
        take_over(base(), theirs, tmp_path / "ours", "m")
    theirs = given(tmp_path / "dora", use_dora=True)
    with pytest.raises(UserError, match=r"other logits|has the extra tensor"):
        take_over(base(), theirs, tmp_path / "ours", "m")
    assert LARGEST_GAP < 0.01 and not (tmp_path / "ours").exists()


def other_width(folder: Path) -> None:
    given(folder, base(hidden_size=96))


def deeper(folder: Path) -> None:
    given(folder, base(num_hidden_layers=3))


def shallower(folder: Path) -> None:
    given(folder)
    state = {key: value for key, value in load_file(folder / WEIGHTS).items() if ".layers.1." not in key}
    save_file(state, folder / WEIGHTS)


def other_family(folder: Path) -> None:
    given(folder)
    config = json.loads((folder / CONFIG).read_text()) | {"target_modules": ["query_key_value"]}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("make", [other_width, deeper, shallower, other_family], ids=lambda make: make.__name__)
def test_an_adapter_of_another_model_is_one_line(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "theirs")
    require_lora(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"adapter.path '.*theirs'.*model.path 'm'") as refused:
        take_over(base(), tmp_path / "theirs", tmp_path / "ours", "m")
    assert "\n" not in str(refused.value) and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"r": None}, "its r is None"),
        ({"r": "4"}, "its r is '4'"),
        ({"r": True}, "its r is True"),
        ({"lora_alpha": float("inf")}, "its lora_alpha is inf"),
        ({"peft_type": None}, "holds a None adapter"),
        ({"a_setting_of_tomorrow": "twice"}, "has a_setting_of_tomorrow"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out"),
    ],
)
def test_invalid_settings_are_one_line(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    config = given(tmp_path) / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=why):
        require_lora(tmp_path)


def test_invalid_numbers_are_one_line(tmp_path: Path) -> None:
    state = load_file(given(tmp_path) / WEIGHTS)
    key = min(state)
    for wrong in (torch.full_like(state[key], torch.nan), torch.zeros(4, 64, dtype=torch.int32)):
        save_file({**state, key: wrong}, tmp_path / WEIGHTS)
        with pytest.raises(UserError, match="not finite floats"):
            require_lora(tmp_path)
