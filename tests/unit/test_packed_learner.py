"""The learner's layout and head give the plain model's values and gradients of each sample alone."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.mamba import MambaConfig

from lorapar_ray import packed_layout
from lorapar_ray.adapters import attach_lora
from lorapar_ray.engines.record import KeptSets
from lorapar_ray.engines.settings import OUTSIDE_TORCH
from lorapar_ray.grpo import head, memory
from lorapar_ray.grpo.head import TokenScorer, head_logprobs
from lorapar_ray.grpo.memory import (
    checkpoint_layers,
    checkpointed_bytes_per_token,
    kept_bytes_per_token,
    pass_limits,
    room_on_gpu,
)
from lorapar_ray.grpo.packing import PackedRows, group_by_prompt, pack, packed_logprobs, pad
from lorapar_ray.grpo.samples import Sample
from lorapar_ray.packed_attention import use_packed_attention
from lorapar_ray.packed_layout import make_layout, spans_of_group
from tests.unit.test_grpo_loss import samples
from tests.unit.tiny_models import SHAPE, tiny

CPU = torch.device("cpu")


def frozen_head(model: Any) -> Any:
    """As in training, but the layers have gradients instead of an adapter."""
    model.get_output_embeddings().requires_grad_(False)
    return model


def sliding(window: int) -> Any:
    """Layers that see only the last `window` tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(vocab_size=96, num_key_value_heads=2, sliding_window=window, **sizes))


def plain_logprobs(model: Any, sample: Sample, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample with the model's forward pass and torch's softmax."""
    ids = torch.tensor([sample.prompt_ids + sample.token_ids])
    logits = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature
    found = torch.distributions.Categorical(logits=logits)
    return found.log_prob(torch.tensor(sample.token_ids)), found.entropy().detach()


def result(
    model: Any, rows: PackedRows, temperature: float, scorer: TokenScorer | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    model.zero_grad()
    logprobs, entropy = packed_logprobs(scorer or TokenScorer(model), rows, temperature=temperature)
    weights = torch.linspace(0.5, 2.0, len(rows.tokens_N))
    (logprobs[rows.mask_BT.bool()] * weights).sum().backward()
    return logprobs, entropy, first_layer_gradient(model)


def first_layer_gradient(model: Any) -> torch.Tensor:
    return next(it.grad.clone() for name, it in model.named_parameters() if ".layers.0." in name and it.dim() == 2)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "mixtral", "window 4", "window 9"])
def test_packed_samples_have_the_plain_models_logprobs_and_gradients(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.SLICE, "cpu", 5 * 96)  # several slices of the head
    name, _, window = family.partition(" ")
    model = frozen_head(sliding(int(window)) if window else tiny(name))
    found = [plain_logprobs(model, sample, 0.9) for sample in samples()]
    total = sum(
        (each * weights).sum()
        for (each, _), weights in zip(
            found,
            torch.linspace(0.5, 2.0, sum(len(each) for each, _ in found)).split([len(each) for each, _ in found]),
            strict=True,
        )
    )
    total.backward()
    gradient = first_layer_gradient(model)
    plain = result(model, pad(samples(), 0, CPU), 0.9)
    assert use_packed_attention(model)
    packed = []
    for key_cost in (0.0, 1e6):  # each completion on its own, and those of a prompt together
        monkeypatch.setattr(packed_layout, "KEY_COST", key_cost)
        packed.append(result(model, pack(group_by_prompt(samples()), CPU), 0.9))
    for ours in (plain, *packed):
        for values, index in zip(ours[:2], (0, 1), strict=True):
            expected = torch.nn.utils.rnn.pad_sequence([each[index] for each in found], batch_first=True)
            torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours[2], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("way", ["head", "capped logits"])
def test_log_probabilities_are_normalised_over_the_kept_set(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients equal those of torch's softmax with all other logits at −∞; some sets are smaller."""
    monkeypatch.setitem(head.SLICE, "cpu", 5 * 4 * 64)  # several slices
    capped = {**SHAPE, "num_key_value_heads": 1}
    config = Gemma2Config(**capped, head_dim=32, final_logit_softcapping=20.0)
    torch.manual_seed(0)
    model = frozen_head(tiny() if way == "head" else AutoModelForCausalLM.from_config(config).eval())
    draw = torch.Generator().manual_seed(1)
    cut = []
    for sample in samples():
        others = [torch.randperm(96, generator=draw)[: 1 + at % 4].tolist() for at in range(len(sample.token_ids))]
        sets = [sorted({token, *other}) for token, other in zip(sample.token_ids, others, strict=True)]
        flat, counts = np.concatenate(sets).astype(np.int32), np.array([len(each) for each in sets], np.int32)
        cut.append((replace(sample, kept=KeptSets(flat, counts)), sets))
    found, entropies = [], []
    for sample, sets in cut:
        logits = model(torch.tensor([[*sample.prompt_ids, *sample.token_ids]])).logits[
            0, len(sample.prompt_ids) - 1 : -1
        ]
        mask = torch.full_like(logits, -torch.inf)
        for row, kept in enumerate(sets):
            mask[row, kept] = 0.0
        among = torch.distributions.Categorical(logits=logits / 0.9 + mask)
        found.append(among.log_prob(torch.tensor(sample.token_ids)))
        entropies.append(among.entropy().detach())
    whole = torch.cat(found)
    (whole * torch.linspace(0.5, 2.0, len(whole))).sum().backward()
    gradient = first_layer_gradient(model)
    for packed in (False, True) if way == "head" else (False,):
        assert not packed or use_packed_attention(model)
        own = [sample for sample, _ in cut]
        rows = pack(group_by_prompt(own), CPU) if packed else pad(own, 0, CPU)
        logprobs_BT, entropy_BT, ours = result(model, rows, 0.9)
        torch.testing.assert_close(logprobs_BT[rows.mask_BT.bool()], whole, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(entropy_BT[rows.mask_BT.bool()], torch.cat(entropies), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours, gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "lengths", "way"),
    [
        (1, (1, 1), "whole"),
        (64, (1, 1), "together"),
        (64, (3, 1, 2), "together"),
        (64, (90, 90), "whole"),
        (300, (7,), "whole"),
        (2000, (100,) * 16, "behind"),
    ],
)
def test_the_layout_of_completions_depends_on_lengths_and_reads_each_column_once(
    prompt: int, lengths: tuple[int, ...], way: str
) -> None:
    starts = [prompt + sum(lengths[:index]) for index in range(len(lengths))]
    own = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    spans = spans_of_group(range(prompt), own)
    apart = len(spans) - sum(span.answers == span.queries == len(span.keys) == prompt for span in spans)
    assert {"whole": len(lengths), "behind": len(lengths), "together": 1}[way] == apart
    assert (len(spans) > apart) == (way != "whole")
    width = prompt + sum(lengths)
    layout = make_layout(spans, width, CPU)
    outputs = sum(batch.spans * batch.queries for batch in layout.batches)
    sources = range(width) if layout.source_W is None else layout.source_W.tolist()
    assert len(set(sources)) == width <= outputs


def test_a_row_holds_a_prompt_once_and_no_token_that_predicts_nothing() -> None:
    rows = pack(group_by_prompt(samples()), CPU)
    assert rows.inputs["input_ids"].shape == (1, (5 + 8 - 3) + (8 + 10 - 3) + (3 + 7 - 3))


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**{**SHAPE, "num_key_value_heads": 1}, head_dim=32),  # soft caps in attention and after the head
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_would_mix_packed_sequences_is_not_packed(config: Any) -> None:
    torch.manual_seed(0)
    model = frozen_head(AutoModelForCausalLM.from_config(config).eval())
    before = model.config._attn_implementation
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == before
    found, _ = packed_logprobs(TokenScorer(model), pad(samples()[:1], 0, CPU), temperature=1.0)
    torch.testing.assert_close(found[0], plain_logprobs(model, samples()[0], 1.0)[0], atol=2e-5, rtol=1e-4)


CHANGED_LOGITS = {
    "gemma2": Gemma2Config(**{**SHAPE, "num_key_value_heads": 1}, head_dim=32, final_logit_softcapping=0.5),
    "cohere2": Cohere2Config(**{**SHAPE, "num_key_value_heads": 1}, logit_scale=0.25),
    "granite": GraniteConfig(**{**SHAPE, "num_key_value_heads": 1}, logits_scaling=3.0),
}


@pytest.mark.parametrize("family", CHANGED_LOGITS)
@pytest.mark.parametrize("cut", [False, True], ids=["whole vocabulary", "kept tokens"])
def test_known_changes_of_the_logits_need_no_stored_logits(
    family: str, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, in several slices, are those of the model's own logits."""
    torch.manual_seed(0)
    config = CHANGED_LOGITS[family]
    model = frozen_head(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    monkeypatch.setitem(head.SLICE, "cpu", 5 * 4 * 64 if cut else 5 * 96)
    rows = pad([everything_kept(sample) if cut else sample for sample in samples()], 0, CPU)
    found = [plain_logprobs(model, sample, 0.9) for sample in samples()]
    whole = torch.cat([each for each, _ in found])
    (whole * torch.linspace(0.5, 2.0, len(whole))).sum().backward()
    gradient = first_layer_gradient(model)
    monkeypatch.setattr(head, "logits_at", None)
    scorer = TokenScorer(model)
    assert not scorer.stores_logits(rows.inputs)
    for _ in range(2):  # the model was seen in the first pass
        logprobs_BT, entropy_BT, ours = result(model, rows, 0.9, scorer)
        torch.testing.assert_close(logprobs_BT[rows.mask_BT.bool()], whole, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(entropy_BT[rows.mask_BT.bool()], torch.cat([each for _, each in found]))
        torch.testing.assert_close(ours, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("done", ["nothing", "the inverse"])
def test_a_model_that_does_not_do_what_its_config_says_needs_no_stored_logits(done: str) -> None:
    """As MiniCPM3, which scales the head's input instead, and HyperCLOVA X, which multiplies where Granite divides."""
    model = frozen_head(tiny())
    model.config.logits_scaling = 2.0
    if done == "the inverse":
        model.register_forward_hook(lambda _, __, output: CausalLMOutput(logits=output.logits * 2.0))
    expected = plain_logprobs(model, samples()[0], 0.9)[0]
    rows = pad(samples()[:1], 0, CPU)
    direct, asked = TokenScorer(model), TokenScorer(model)
    assert not asked.stores_logits(rows.inputs)
    for scorer in (direct, asked):
        found, _ = packed_logprobs(scorer, rows, temperature=0.9)
        torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=1e-4)
        assert not scorer.stores_logits(rows.inputs)


def everything_kept(sample: Sample) -> Sample:
    """From a sampler that kept the whole vocabulary."""
    count = len(sample.token_ids)
    return replace(sample, kept=KeptSets(np.tile(np.arange(96, dtype=np.int32), count), np.full(count, 96, np.int32)))


@pytest.mark.parametrize("why", ["unknown change", "trained head"])
def test_another_head_gets_its_logits_and_the_room_for_them(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen_head(tiny())
    if why == "unknown change":
        model.register_forward_hook(lambda _, __, output: CausalLMOutput(logits=output.logits.sin()))
    else:
        model.get_output_embeddings().requires_grad_(True)
    rows, scorer = pad(samples()[:1], 0, CPU), TokenScorer(model)
    assert scorer.stores_logits(rows.inputs)
    found, _ = packed_logprobs(scorer, rows, temperature=1.0)
    torch.testing.assert_close(found[0], plain_logprobs(model, samples()[0], 1.0)[0], atol=2e-5, rtol=1e-4)
    monkeypatch.setattr(memory, "free_memory", lambda device, share: 1e6)
    for checkpointing in (False, True):
        kept = kept_bytes_per_token(model, rows.inputs)
        kept = checkpointed_bytes_per_token(model, kept) if checkpointing else kept
        for logits, more in ((False, 0), (True, 2 * 96 * 4)):
            limits = {"share": 1.0, "checkpointing": checkpointing, "logits": logits}
            assert pass_limits(model, rows.inputs, 1, **limits)[0] == int(1e6 / (kept + more))


def test_a_learners_part_of_a_gpu_is_less_what_it_holds_and_not_what_an_engine_does() -> None:
    """Engine and learner start together: of 80 GiB, 0.4 are the learner's, whose base takes 13."""
    gib = 2**30
    alone, beside = (room_on_gpu(free, 80 * gib, 13 * gib, 0.4) for free in (66 * gib, 23 * gib))
    assert alone == beside == 32 * gib - 13 * gib - OUTSIDE_TORCH
    assert room_on_gpu(10 * gib, 80 * gib, 13 * gib, 0.4) == 10 * gib  # others took more than their part
    assert room_on_gpu(60 * gib, 80 * gib, 40 * gib, 0.4) == 0.0
    assert room_on_gpu(66 * gib, 80 * gib, 13 * gib, 1.0) == 66 * gib  # a GPU of its own


class Live(TorchDispatchMode):
    """The most bytes that were alive at once of what operations made, without some tensors."""

    def __init__(self, without: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._without = {each.untyped_storage()._cdata for each in without}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self._without:
                storage = each.untyped_storage()
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [3, 6])
def test_what_a_token_takes_is_what_a_pass_holds_at_its_peak(layers: int, checkpointing: bool) -> None:
    """With checkpointing all inputs, and the layer that is recomputed; gradients on the way come on top, for which
    `SHARE` leaves room."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4, vocab_size=96
    )
    model = attach_lora(LlamaForCausalLM(config), rank=4, alpha=8).eval()

    def inputs(tokens: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "position_ids": torch.arange(tokens)[None]}

    told = kept_bytes_per_token(model, inputs(64))
    if checkpointing:
        told = checkpointed_bytes_per_token(model, told)
        checkpoint_layers(model)
    peaks = []
    for tokens in (128, 256):
        model.zero_grad()
        with Live(model.parameters()) as live:
            model(**inputs(tokens), use_cache=False, logits_to_keep=1).logits.sum().backward()
        peaks.append(live.peak)
    seen = (peaks[1] - peaks[0]) / 128
    assert 0.7 * seen < told <= seen, (told, seen)


def test_a_16_bit_head_computes_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 64, dtype=torch.bfloat16), torch.randn(96, 64, dtype=torch.bfloat16)
    tokens = torch.tensor([0, 5, 9, 95, 3, 3])
    exact = (hidden.float() @ weight.float().T).log_softmax(-1)[range(6), tokens]
    ours, _ = head_logprobs(hidden.requires_grad_(), weight, tokens, wide_VD=weight.float())
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
    ours.sum().backward()
    wide = hidden.detach().float().requires_grad_()
    (wide @ weight.float().T).log_softmax(-1)[range(6), tokens].sum().backward()
    torch.testing.assert_close(hidden.grad.float(), wide.grad, atol=0.05, rtol=0.02)


def test_the_head_never_makes_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.SLICE, "cpu", 8 * 96)
    sizes = []
    product = head._product
    monkeypatch.setattr(head, "_product", lambda *given: sizes.append(len(given[0])) or product(*given))
    hidden = torch.randn(30, 64, requires_grad=True)
    head_logprobs(hidden, torch.randn(96, 64), torch.zeros(30, dtype=torch.long))[0].sum().backward()
    assert sizes == [8, 8, 8, 6]


@pytest.mark.gpu
def test_a_16_bit_head_computes_in_float32_on_a_gpu_too() -> None:
    """There without a float32 copy of the weight."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for shape in ((70, 64), (1000, 64))
    )
    tokens = torch.randint(1000, (70,), generator=generator, device="cuda")
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    ours, _ = head_logprobs(hidden.requires_grad_(), weight, tokens)
    torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-5)
    ours.sum().backward()
    wide = hidden.detach().double().requires_grad_()
    (wide @ weight.double().T).log_softmax(-1).gather(-1, tokens[:, None]).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), wide.grad, atol=0.05, rtol=0.02)


@pytest.mark.gpu
def test_the_next_rows_do_not_wait_for_the_gpu() -> None:
    """It is still busy with the rows before, while the next ones are laid out and copied."""
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed, padded = pack(group_by_prompt(samples()), device), pad(samples(), 0, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for rows, expected in ((packed, pack(group_by_prompt(samples()), CPU)), (padded, pad(samples(), 0, CPU))):
        for name in ("row_N", "column_N", "tokens_N", "mask_BT", "sampling_logprobs_BT", "advantages_B"):
            assert torch.equal(getattr(rows, name).cpu(), getattr(expected, name))
        assert torch.equal(rows.inputs["input_ids"].cpu(), expected.inputs["input_ids"])
