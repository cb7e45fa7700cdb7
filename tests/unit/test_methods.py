"""Prompt tuning, P-tuning, prefix tuning and IA3: seeds, PEFT's file format, and answers by their definition."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lorapar_ray.adapters import attach_method, save_method
from lorapar_ray.config import Config, ModelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.generator import Generator
from tests.tiny_run import tiny_config
from tests.unit.tiny_models import tiny

METHODS = ["prompt_tuning", "p_tuning", "prefix_tuning", "ia3"]
TOKENS = torch.arange(3, 19).view(2, 8)


def trained(method: str, seed: int = 5) -> dict[str, torch.Tensor]:
    model = attach_method(tiny(), method, virtual_tokens=4, seed=seed)
    return {key: value.detach() for key, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_few_float32_parameters_from_a_seed(method: str) -> None:
    first, again, other = trained(method), trained(method), trained(method, seed=6)
    assert first and all(value.dtype == torch.float32 for value in first.values())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert method == "ia3" or any(not torch.equal(first[key], other[key]) for key in first)
    if method == "ia3":
        assert {key.rsplit(".", 2)[0].rsplit(".", 1)[-1] for key in first} == {"k_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize("method", METHODS)
def test_saved_methods_load_in_stock_peft_with_the_same_logits(method: str, tmp_path: Path) -> None:
    model = attach_method(tiny(), method, virtual_tokens=4, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_method(model.eval(), tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
    assert not list((tmp_path / "adapter").glob("*.bin"))


@pytest.mark.parametrize("method", [None, *METHODS])
def test_many_prompts_are_answered_as_one_after_the_other(method: str | None, student: Path, tmp_path: Path) -> None:
    generator = Generator(ModelConfig(path=str(student), dtype="float32").model_dump(mode="json"), str(student))
    generator.load(None)
    if method is not None:
        model = attach_method(generator._model, method, virtual_tokens=4, seed=5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        save_method(model, tmp_path / "adapter")
        generator.load(str(tmp_path / "adapter"))
    prompts = [[7, 99, 2048], [504, 216, 33, 1043, 28, 7, 99], [12], [504, 8, 33, 1043, 28, 7, 99]]
    together = generator.greedy(prompts, 6)
    assert together == [generator.greedy([prompt], 6)[0] for prompt in prompts]
    # and by the definition: the most likely next token, computed from the whole text each time
    text = list(prompts[1])
    for token in together[1]:
        assert token == int(generator._model(input_ids=torch.tensor([text])).logits[0, -1].argmax())
        text.append(token)


def test_methods_without_a_partition_are_refused_where_one_is_asked_for(student: Path) -> None:
    plain = tiny_config(student) | {"adapter": {"method": "ia3"}}
    with pytest.raises(ValueError, match=r"set order to \[sft\] and sft.masked to false"):
        Config.model_validate(plain)
    with pytest.raises(ValueError, match="turn them off"):
        Config.model_validate({**plain, "order": ["sft"], "sft": {"masked": False, "packing": True}})


def test_ia3_needs_its_layers() -> None:
    with pytest.raises(UserError, match="matches no layer"):
        attach_method(torch.nn.Sequential(torch.nn.Linear(2, 2)), "ia3", virtual_tokens=4, seed=0)
