"""Batched per-example gradient sums, compared with autograd on one example at a time."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig

from lorapar_ray.adapters import adapter_parameters, adapter_state, attach_lora
from lorapar_ray.config import ModelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.importance import (
    GradSums,
    TokenizedExample,
    collate,
    example_losses,
    gradient_sums,
    pack,
    score,
)
from lorapar_ray.packed_attention import packs
from lorapar_ray.student import load_base
from tests.unit.tiny_models import CONFIGS, GROUPED, tiny

EXAMPLES = [
    TokenizedExample(str(k), torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(k)).tolist(), n // 2)
    for k, n in enumerate((6, 9, 12, 7, 10))
]


def model_of(family: str = "llama"):
    return attach_lora(tiny(family), rank=4, alpha=8, init="gaussian", init_std=0.1, seed=1)


def layers_of(model):
    return model.get_base_model().model.layers


def naive(model) -> GradSums:
    """Autograd on one example after another."""
    parameters = adapter_parameters(model)
    sums = GradSums.zeros(dict(parameters))
    for example in EXAMPLES:
        loss = example_losses(model, collate([example], pad_id=0))[0]
        for key, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            sums.first[key] += gradient
            sums.second[key] += gradient**2
        sums.n += 1
    return sums


def assert_close(ours: GradSums, theirs: GradSums, tolerance: float = 1e-4) -> None:
    assert ours.n == theirs.n
    for mine, other in ((ours.first, theirs.first), (ours.second, theirs.second)):
        for key, value in mine.items():
            assert (value - other[key]).norm() <= tolerance * other[key].norm() + 1e-12, key


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_sums_equal_one_example_at_a_time(family: str) -> None:
    model = model_of(family)
    assert_close(gradient_sums(model, [collate(EXAMPLES, pad_id=0)]), naive(model))


def test_a_four_bit_base_is_scored_as_it_computes(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    settings = ModelConfig(path=str(tmp_path), dtype="float32", quantization="nf4")
    base = load_base(settings, str(tmp_path), on=torch.device("cpu"))
    model = attach_lora(base, rank=4, alpha=8, init="gaussian", init_std=0.1, seed=1)
    assert "4bit" in type(layers_of(model)[0].self_attn.q_proj).__name__
    assert_close(gradient_sums(model, [collate(EXAMPLES, pad_id=0)]), naive(model))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batch_size_and_order_do_not_matter(size: int) -> None:
    model = model_of()
    shuffled = EXAMPLES[::-1]
    batches = [collate(shuffled[i : i + size], 0) for i in range(0, len(shuffled), size)]
    assert_close(gradient_sums(model, batches), naive(model))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_packed_rows_count_every_example_on_its_own(family: str) -> None:
    model = model_of(family)
    examples = [EXAMPLES[0], replace(EXAMPLES[1], response_start=0), *EXAMPLES[2:]]
    assert packs(model)
    ours = gradient_sums(model, [pack(examples[:3]), pack(examples[3:])])
    assert_close(ours, gradient_sums(model, [collate(examples, 0)]))


def test_packed_examples_longer_than_a_sliding_window_see_the_window_only() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**GROUPED, sliding_window=4)
    model = attach_lora(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), rank=4, alpha=8)
    for value in adapter_parameters(model).values():
        torch.nn.init.normal_(value, 0.0, 0.1)
    assert packs(model)
    assert_close(gradient_sums(model, [pack(EXAMPLES)]), naive(model))


def test_a_model_that_mixes_tokens_outside_attention_is_not_packed() -> None:
    model = model_of()
    attention = layers_of(model)[0].self_attn.o_proj
    attention.register_forward_hook(lambda _, __, output: output + output.roll(1, dims=1))
    assert not packs(model)
    assert model.config._attn_implementation == "eager"


def test_soft_capped_logits_are_those_of_the_model() -> None:
    config = Gemma2Config(**GROUPED, final_logit_softcapping=0.05, attn_logit_softcapping=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs = [model(**collate([example], 0)).loss.item() for example in EXAMPLES]
    assert example_losses(model, collate(EXAMPLES, 0)).tolist() == pytest.approx(theirs, rel=1e-5)
    assert example_losses(model, pack(EXAMPLES)).tolist() == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_gives_the_same_sums_without_dropout(reentrant: bool) -> None:
    model = attach_lora(tiny(), rank=4, alpha=8, dropout=0.5, init="gaussian", init_std=0.1, seed=1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    runs = []
    handles = [layer.self_attn.register_forward_hook(lambda *_: runs.append(1)) for layer in layers_of(model)]
    assert_close(gradient_sums(model, [collate(EXAMPLES, 0)]), naive(model_of()))
    assert len(runs) == 2 * len(handles)


def test_checkpointing_keeps_no_layer_inputs_between_forward_and_backward() -> None:
    model = model_of()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept, alive = [], []
    adapter = layers_of(model)[0].self_attn.q_proj.base_layer
    adapter.register_forward_hook(lambda _, inputs, __: kept.append(weakref.ref(inputs[0].untyped_storage())))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *_: alive.append(kept[0]() is not None))
    gradient_sums(model, [collate(EXAMPLES, 0)])
    assert alive == [False]


def test_only_labelled_positions_get_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(), collate(EXAMPLES, 0)
    rows: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: rows.append(logits[..., 0].numel())
    )
    losses = example_losses(model, batch)
    assert rows == [1]  # for the model's own output; those of the loss are taken before it, by slices
    handle.remove()
    monkeypatch.setattr(model.get_base_model(), "get_output_embeddings", lambda: None)
    torch.testing.assert_close(example_losses(model, batch), losses)


def test_losses_are_those_of_transformers() -> None:
    model = model_of()
    theirs = [model(**collate([example], 0)).loss.item() for example in EXAMPLES]
    assert example_losses(model, collate(EXAMPLES, 0)).tolist() == pytest.approx(theirs, rel=1e-5)


def test_a_layer_that_misses_tokens_is_refused() -> None:
    model = model_of()
    mlp = layers_of(model)[0].mlp
    whole = mlp.forward
    mlp.forward = lambda hidden: torch.nn.functional.pad(whole(hidden[:, :-1]), (0, 0, 0, 1))
    with pytest.raises(UserError, match=r"gate_proj.*sees 55 of 60 tokens; leave its layer out"):
        gradient_sums(model, [collate(EXAMPLES, 0)])


@pytest.mark.parametrize("reentrant", [True, False])
def test_packed_rows_are_computed_again_as_packed_rows(reentrant: bool) -> None:
    expected = gradient_sums(model_of(), [pack(EXAMPLES)])
    model = model_of()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradient_sums(model, [pack(EXAMPLES)])
    for key, value in expected.second.items():
        torch.testing.assert_close(found.second[key], value)


def test_the_model_is_left_as_it_was_found() -> None:
    model = model_of()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    layers_of(model)[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    gradient_sums(model, [collate(EXAMPLES, 0)])
    assert modes == [module.training for module in model.modules()]
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers_of(model))
    assert before == {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}


def test_fisher_is_the_mean_of_squares_not_the_square_of_the_mean() -> None:
    sums = gradient_sums(model_of(), [collate(EXAMPLES, 0)])
    key = next(iter(sums.first))
    gradient, fisher = sums.mean(key)
    assert (fisher >= gradient**2 - 1e-12).all()
    assert fisher.sum() > 1.5 * (gradient**2).sum()


def test_criteria_follow_their_formulas() -> None:
    phi = {"k": torch.tensor([2.0, -1.0, 0.0])}
    sums = GradSums(2, {"k": torch.tensor([1.0, 4.0, 6.0])}, {"k": torch.tensor([3.0, 10.0, 20.0])})
    assert score("taylor2", phi, sums)["k"].tolist() == [2.0, 4.5, 0.0]
    assert score("taylor1", phi, sums)["k"].tolist() == [1.0, 2.0, 0.0]
    assert score("fisher", phi, sums)["k"].tolist() == [6.0, 5.0, 0.0]
    assert score("magnitude", phi, sums)["k"].tolist() == [2.0, 1.0, 0.0]
    assert torch.equal(score("random", phi, sums, seed=3)["k"], score("random", phi, sums, seed=3)["k"])


def test_a_zero_b_adapter_is_refused() -> None:
    model = attach_lora(tiny(), rank=4, alpha=8)
    with pytest.raises(UserError, match=r"every importance score is zero.*warmup_steps"):
        score("taylor2", adapter_state(model), gradient_sums(model, [collate(EXAMPLES, 0)]))


def test_units_saved_and_added_equal_one_pass(tmp_path: Path) -> None:
    model = model_of()
    for index in range(2):
        gradient_sums(model, [collate(EXAMPLES[index::2], 0)]).save(tmp_path / f"{index}.safetensors")
    total = GradSums.load(tmp_path / "0.safetensors")
    total.add(GradSums.load(tmp_path / "1.safetensors"))
    assert_close(total, gradient_sums(model, [collate(EXAMPLES, 0)]), 1e-5)


def test_an_example_without_a_response_is_an_error() -> None:
    empty = TokenizedExample("x", [3, 4, 5], 3)
    with pytest.raises(ValueError, match="no labelled token"):
        gradient_sums(model_of(), [collate([empty, EXAMPLES[0]], 0)])
