"""Batched per-example gradient sums against autograd, one example at a time."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorapar_ray.adapters import adapter_parameters, adapter_state, attach_lora
from lorapar_ray.config import ModelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.importance import GradSums, TokenizedExample, collate, example_losses, gradient_sums, score
from lorapar_ray.student import load_base
from tests.unit.tiny_models import CONFIGS, tiny

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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_batch_size_order_and_padding_side_do_not_matter(side: str, size: int) -> None:
    model = model_of()
    shuffled = EXAMPLES[::-1]
    batches = [collate(shuffled[i : i + size], 0, side) for i in range(0, len(shuffled), size)]
    assert_close(gradient_sums(model, batches), naive(model))


@pytest.mark.parametrize("prompt", [4, 0])
def test_packed_rows_count_every_example_on_its_own(prompt: int) -> None:
    model = model_of()
    first, second = EXAMPLES[0], replace(EXAMPLES[1], response_start=prompt)
    width = len(first.input_ids) + len(second.input_ids)
    segments = torch.tensor([[0] * len(first.input_ids) + [1] * len(second.input_ids)])
    apart = segments[0, :, None] == segments[0, None, :]
    visible = apart & torch.ones(width, width, dtype=torch.bool).tril()
    parts = [collate([example], 0) for example in (first, second)]
    packed = {key: torch.cat([part[key] for part in parts], dim=1) for key in ("input_ids", "labels", "position_ids")}
    mask = torch.zeros(1, 1, width, width).masked_fill(~visible, torch.finfo(torch.float32).min)
    ours = gradient_sums(model, [{**packed, "attention_mask": mask, "segment_ids": segments}])
    assert_close(ours, gradient_sums(model, parts))


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
    adapter = layers_of(model)[0].self_attn.q_proj.lora_A.default
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
    assert rows == [int((batch["labels"] != -100).sum())]
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
    with pytest.raises(UserError, match=r"down_proj.*sees 55 of 60 tokens; leave its layer out"):
        gradient_sums(model, [collate(EXAMPLES, 0)])


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
