"""Learners that share sequences take the update of one learner, each with a part of the activations."""

import multiprocessing
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MambaConfig, MistralConfig

from lorapar_ray.adapters import adapter_parameters, attach_lora
from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.record import KeptSets
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.arm import Arm
from lorapar_ray.grpo.forward import Forward
from lorapar_ray.grpo.memory import kept_bytes_per_token
from lorapar_ray.grpo.packing import pack
from lorapar_ray.grpo.samples import MiniBatch, Sample
from lorapar_ray.grpo.update import Updates
from lorapar_ray.heavy_imports import import_peft
from lorapar_ray.replaced import replaced
from lorapar_ray.sequence_parallel import SequenceGroup, require_shareable, sequence_group
from tests.unit.test_learner import whole_batch

import_peft()  # once for all ranks, like what is imported above
WORLD = 4
CPU = torch.device("cpu")
SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}  # for four learners they are repeated
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **HEADS),
    "window": MistralConfig(**SHAPE, **HEADS, sliding_window=5),
    "capped": Gemma2Config(**SHAPE, **HEADS, head_dim=8),  # soft caps in attention, which is not packed
}
LENGTHS = {
    "shared": [(5, (4, 1, 3)), (8, (2, 6, 2)), (3, (1, 1, 5))],
    "behind": [(40, (2, 3, 1)), (3, (9,))],  # a prompt that is computed apart from its completions
    "plain": [(5, (7,)), (2, (3,)), (6, (4,)), (1, (1,))],
}
"""A prompt's tokens, and those of its completions."""
FILLER = Sample([5, 6, 7], [8, 9, 10, 11], [0.0] * 4, 0.0, finished=True, version=0)
CASES: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "two groups": (2, "llama", "shared", {}),
    "a group without samples": (2, "llama", "alone", {"loss": "bnpo"}),
    "ratio of a sequence": (4, "llama", "shared", {"loss": "gspo", "kl_beta": 0.1}),
    "prompt apart": (4, "llama", "behind", {"loss": "grpo"}),
    "plain": (4, "llama", "plain", {}),
    "window": (2, "window", "plain", {}),
    "tools and kept sets": (4, "llama", "tools", {}),
    "small passes": (4, "llama", "shared", {"micro_batch_size": 2, "gradient_checkpointing": True}),
}
LENGTHS["tools"] = LENGTHS["shared"]
LENGTHS["alone"] = LENGTHS["shared"][:1]


def samples(kind: str) -> list[list[Sample]]:
    """By prompt."""
    draw = random.Random(0)

    def completion(prompt: list[int], length: int) -> Sample:
        own = [draw.randrange(3, 96) for _ in range(length)]
        logprobs = [draw.uniform(-5, -4) for _ in own]
        sample = Sample(prompt, own, logprobs, draw.uniform(-1, 1), finished=True, version=0)
        return tool_use(sample) if kind == "tools" else sample

    found = []
    for length, completions in LENGTHS[kind]:
        prompt = [draw.randrange(3, 96) for _ in range(length)]
        found.append([completion(prompt, each) for each in completions])
    return found


def tool_use(sample: Sample) -> Sample:
    """Every second token comes from an environment; the others were sampled from three kept ones."""
    sampled = np.arange(len(sample.token_ids)) % 2 == 0
    kept = np.array([[token, 1, 2] for token in np.array(sample.token_ids)[sampled]], np.int32)
    return replace(sample, sampled=sampled, kept=KeptSets(kept.flatten(), 3 * sampled.astype(np.int32)))


def learner(family: str, ranks: int, settings: dict[str, Any]) -> tuple[Any, Forward, Updates]:
    """(model, passes, updates) of one learner, whose model has been trained a little."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[family]), dtype=torch.float32)
    model = attach_lora(base, rank=2, alpha=4, targets="qkvgud", init="gaussian", init_std=0.3, seed=0).eval()
    config = GrpoConfig(learners=WORLD, sequence_parallel=ranks, max_grad_norm=1e3, **settings)
    group = sequence_group(ranks, 60)
    forward = Forward(model, config, pad_id=0, filler=FILLER, sharded=False, device=CPU, sequence=group)
    parameters = adapter_parameters(model)
    updates = Updates(forward, [Arm(parameters, config, steps=1)], list(parameters.values()))
    for value in parameters.values():  # away from the reference of the KL divergence
        value.data += 0.05
    return model, forward, updates


def update(family: str, ranks: int, kind: str, settings: dict[str, Any], mine: slice, world: int) -> dict[str, Any]:
    """The gradients and metrics of one update on some of the prompts, summed over the learners."""
    prompts = samples(kind)
    every = [sample for group in prompts for sample in group]
    own = [sample for group in prompts[mine] for sample in group]
    model, _, updates = learner(family, ranks, settings)
    gradients: dict[str, torch.Tensor] = {}

    def note(_: int) -> None:
        gradients.update({key: value.grad.clone() for key, value in adapter_parameters(model).items()})

    batch = MiniBatch(own, sum(sample.count for sample in every), len(every))
    metrics = updates.take({0: batch}, {}, world, note)
    return {"metrics": metrics[0], "gradients": gradients}


def kept_bytes(ranks: int) -> float:
    """Bytes that one learner stores for the backward pass of two samples with one prompt."""
    model, forward, _ = learner("llama", ranks, {})
    prompt, lengths = [7] * 100, (200, 212)
    rows = forward.rows([[Sample(prompt, [9] * each, [0.0] * each, 0.0, True, 0) for each in lengths]])
    return kept_bytes_per_token(model, rows.inputs) * rows.inputs["input_ids"].numel()


def slice_of_the_next_rank(group: SequenceGroup, width: int) -> slice:
    """A fault: the row's parts in another order."""
    count, at = width // group.size, (group.rank + 1) % group.size
    return slice(at * count, (at + 1) * count)


def worker(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    for name, (ranks, family, kind, settings) in CASES.items():
        mine = slice(None) if ranks == WORLD else (slice(0, 1), slice(1, None))[rank // ranks]
        found[name] = update(family, ranks, kind, settings, mine, WORLD)
    found["bytes"] = {ranks: kept_bytes(ranks) for ranks in (1, 2, 4)}
    with replaced(SequenceGroup, "own", slice_of_the_next_rank):
        try:
            learner("llama", WORLD, {})
        except UserError as error:
            found["refusal"] = str(error)
    torch.save(found, root / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's results."""
    root = tmp_path_factory.mktemp("sequence")
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(worker, (root,), nprocs=WORLD, start_method="forkserver")
    return [torch.load(root / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_learners_that_share_sequences_take_the_update_of_one(case: str, found: list[dict[str, Any]]) -> None:
    _, family, kind, settings = CASES[case]
    alone = update(family, 1, kind, settings, slice(None), 1)
    assert len(alone["gradients"]) == 24 and alone["metrics"]["grad_norm"] > 0
    for rank in range(WORLD):
        together = found[rank][case]
        for key, number in alone["metrics"].items():
            assert together["metrics"][key] == pytest.approx(number, rel=1e-5, abs=1e-6), key
        for key, value in alone["gradients"].items():
            size = float(value.abs().max())
            assert size > 0
            torch.testing.assert_close(together["gradients"][key], value, rtol=0, atol=1e-5 * size, msg=key)


def test_slices_make_up_the_row_and_each_token_is_predicted_in_one() -> None:
    prompts = samples("shared")
    whole = pack(prompts, CPU)
    for size in (2, 3, 5, 64):
        parts = [pack(prompts, CPU, SequenceGroup(rank, size, None)) for rank in range(size)]
        for name in ("input_ids", "position_ids"):
            joined = torch.cat([part.inputs[name] for part in parts], 1)
            width = whole.inputs[name].shape[1]
            assert torch.equal(joined[:, :width], whole.inputs[name]) and joined.shape[1] - width < size
        owners = torch.cat([part.own.at_n for part in parts if part.own is not None])
        assert owners.sort().values.tolist() == list(range(len(whole.tokens_N)))
        columns = torch.cat(
            [part.column_N + rank * part.inputs["input_ids"].shape[1] for rank, part in enumerate(parts)]
        )
        assert torch.equal(columns[owners.argsort()], whole.column_N)


@pytest.mark.parametrize(
    ("config", "ranks", "message"),
    [
        (CONFIGS["llama"], 3, r"3 learners cannot divide the model's 4 attention heads; set one of 1, 2, 4"),
        (MambaConfig(), 2, r"cannot divide the model's 0 attention heads; set one of 1$"),
        (LlamaConfig(**HEADS, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), 2, r"\(dynamic\) depend"),
    ],
    ids=["heads", "no heads", "rotary embeddings"],
)
def test_a_model_whose_sequences_cannot_be_shared_is_refused(config: Any, ranks: int, message: str) -> None:
    require_shareable(config, 1)
    with pytest.raises(UserError, match=message):
        require_shareable(config, ranks)


@pytest.mark.parametrize("settings", [{}, {"mini_batch": 1}, {"kl_beta": 0.1}], ids=str)
def test_passes_of_a_model_that_does_not_pack_hold_padding_and_give_the_same_update(settings: dict[str, Any]) -> None:
    draw = random.Random(0)
    ids = [[draw.randrange(3, 96) for _ in range(width)] for width in (20, 20, 100, 20, 20, 20)]
    own = [Sample(it[:8], it[8:], [-4.5] * (len(it) - 8), draw.uniform(-1, 1), True, 0) for it in ids]
    batch = whole_batch(own)
    found = []
    for tokens in (110, 1000):
        model, forward, updates = learner("capped", 1, {"micro_batch_tokens": tokens, "loss": "bnpo", **settings})
        passes = [forward.rows(micro).inputs["input_ids"].numel() for micro in forward.micro_batches(own)]
        assert passes == ([100, 100] if tokens == 110 else [600])
        later = settings.get("mini_batch") is not None
        old = updates.old_logprobs({0: [whole_batch([FILLER]), batch]}) if later else {}
        assert len(old) == (len(own) if later else 0)
        metrics = updates.take({0: batch}, old, 1)[0]
        found.append((metrics, {key: value.grad for key, value in adapter_parameters(model).items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-6)
    for key, value in found[1][1].items():
        torch.testing.assert_close(found[0][1][key], value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=key)


def test_a_model_that_does_not_pack_is_refused() -> None:
    model = attach_lora(AutoModelForCausalLM.from_config(CONFIGS["capped"]), rank=2, alpha=4, targets="qkvgud").eval()
    alone: Any = {"pad_id": 0, "filler": FILLER, "sharded": False, "device": CPU}
    with pytest.raises(UserError, match=r"sequence_parallel: learners cannot share sequences of this model.*; set 1"):
        Forward(model, GrpoConfig(), **alone, sequence=SequenceGroup(0, 2, None))


@pytest.mark.slow
def test_learners_check_that_sharing_changes_nothing(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "learners cannot share sequences of this model" in each["refusal"]


@pytest.mark.slow
def test_a_learner_stores_its_part_of_the_activations(found: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        stored = found[rank]["bytes"]
        assert stored[2] == pytest.approx(stored[1] / 2, rel=0.02)
        assert stored[4] == pytest.approx(stored[1] / 4, rel=0.02)
