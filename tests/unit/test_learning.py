"""Each training stage learns: on a task that a tiny model learns in seconds, its curve must pass the values stated
here.

A sign error in a loss, shuffled advantages, or a mask that trains nothing makes these tests fail.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lorapar_ray.adapters import adapter_parameters, attach_lora, load_adapter, save_adapter
from lorapar_ray.config import GrpoConfig, SftConfig
from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.record import record_of
from lorapar_ray.grpo.batches import make_batch, mini_batches, shares_of
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.learner import GrpoJob, Learner
from lorapar_ray.importance import GradSums, score
from lorapar_ray.optim import MaskedAdamW, masked_param_groups
from lorapar_ray.partition import assign_regions, keep_top, save_regions, stage_mask
from lorapar_ray.sft.arm import Worker
from lorapar_ray.sft.batches import plan_batches
from lorapar_ray.sft.loop import TrainingLoop
from lorapar_ray.sft.passes import EagerPasses
from lorapar_ray.sft.step_log import StepLog
from tests.tiny_run import metrics
from tests.unit.tiny_models import GROUPED

CPU = torch.device("cpu")
WORDS = GROUPED["vocab_size"]
THETA = 0.9


def tiny() -> Any:
    """A random Llama whose frozen head can tell its words apart, like a trained head."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, initializer_range=0.1), attn_implementation="eager")


def regions_of(model: Any) -> dict[str, torch.Tensor]:
    """A partition from random scores: each stage trains most of the adapter."""
    state = {key: value.detach() for key, value in adapter_parameters(model).items()}
    scores = [score("random", state, GradSums.zeros(state), seed=seed) for seed in (1, 2)]
    kept = [keep_top(each, THETA) for each in scores]
    return assign_regions(*kept, *scores, alpha=0.5, beta=0.5)


def sums_modulo(count: int) -> list[dict[str, Any]]:
    """Rows `a, a + 1 → a + 2, a + 3, a + 4`, of tokens from 3 on."""
    return [
        {"input_ids": [3 + (first + each) % (WORDS - 3) for each in range(5)], "response_start": 2}
        for first in range(count)
    ]


def test_sft_learns(tmp_path: Path) -> None:
    """Counting on from two numbers: from above 4 nats a token (chance: 4.6) to below 1.5."""
    settings = SftConfig(batch_size=16, micro_batch_size=16, epochs=12, learning_rate=2e-2, schedule="constant")
    model = attach_lora(tiny(), rank=8, alpha=16, init="gaussian", init_std=0.05)
    parameters = adapter_parameters(model)
    masks = stage_mask(regions_of(model), stage=1)
    rows = sums_modulo(64)
    TrainingLoop(
        model,
        MaskedAdamW(masked_param_groups(parameters, masks, lr=settings.learning_rate, weight_decay=0.0)),
        EagerPasses(model, list(parameters.values()), CPU),
        settings=settings,
        plan=plan_batches([len(each["input_ids"]) for each in rows], settings, 1, seed=0),
        examples=rows,
        validation=[],
        filler=0,
        worker=Worker(0, 1, CPU),
        checkpoints=None,
        log=StepLog(tmp_path / "metrics" / "sft.jsonl", None, 1.0),
    ).run(None)
    losses = [line["loss"] for line in metrics(tmp_path, "sft")]
    assert losses[0] > 4.0
    assert fmean(losses[-4:]) < 1.5


@pytest.fixture
def job(tmp_path: Path) -> GrpoJob:
    """Stage 2 of a tiny model that learns which tokens are rewarded."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    tokens = {"pad_token": "w0", "unk_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(tmp_path / "student")
    tiny().save_pretrained(tmp_path / "student")
    model = attach_lora(tiny(), rank=8, alpha=16, init="gaussian", init_std=0.05)
    save_adapter(model, tmp_path / "adapter")
    save_regions(regions_of(model), tmp_path / "regions.safetensors", theta=THETA, alpha=0.5, beta=0.5)
    return GrpoJob(
        model={"path": str(tmp_path / "student"), "dtype": "float32"},
        settings={
            "group_size": 8,
            "max_prompt_length": 8,
            "max_completion_length": 6,
            "learning_rate": 2e-2,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        },
        base=str(tmp_path / "student"),
        adapter_in=str(tmp_path / "adapter"),
        adapter_out=str(tmp_path / "out"),
        regions=str(tmp_path / "regions.safetensors"),
        canaries=[[[5, 6, 7, 8], 2]],
        checkpoints=str(tmp_path / "checkpoints"),
        metrics=str(tmp_path / "grpo.jsonl"),
        samples=str(tmp_path / "samples.jsonl"),
        steps=20,
        coordinator="",
        run="test",
        seed=0,
    )


@torch.no_grad()
def sampled(policy: Any, prompt: list[int], settings: GrpoConfig, draw: torch.Generator) -> list[Completion]:
    """Completions sampled from the policy, with its log-probabilities."""
    ids = torch.tensor([prompt] * settings.group_size)
    found = []
    for _ in range(settings.max_completion_length):
        logprobs = policy(input_ids=ids).logits[:, -1].float().log_softmax(-1)
        token = torch.multinomial(logprobs.exp(), 1, generator=draw)
        found.append(logprobs.gather(1, token))
        ids = torch.cat([ids, token], dim=1)
    own, logprobs = ids[:, len(prompt) :].tolist(), torch.cat(found, dim=1).tolist()
    return [Completion(tokens, each, True, 0) for tokens, each in zip(own, logprobs, strict=True)]


def wanted(completion: Completion) -> float:
    """Share of tokens in the lower half of the vocabulary."""
    return fmean(token < WORDS // 2 for token in completion.token_ids)


def test_grpo_learns(job: GrpoJob) -> None:
    """Tokens of the lower half: from one in two (chance) to more than three in four."""
    learner, draw = Learner([job]), torch.Generator().manual_seed(0)
    [arm] = learner.arms
    policy = load_adapter(tiny(), Path(job.adapter_in)).eval()  # the learner's own model reads packed rows only
    rewards = []
    for step in range(job.steps):
        groups = []
        for prompt in ([5, 6, 7], [60, 61], [9, 80, 33, 4]):
            completions = sampled(policy, prompt, arm.settings, draw)
            found = [wanted(each) for each in completions]
            record = record_of(prompt, completions)
            groups.append(Group(len(groups), record, record.head, rewards=found, parts={"wanted": list(found)}))
        rows = [{"prompt": "", "answer": ""}] * len(groups)
        batch = make_batch(groups, [], prompts=[0, 1, 2], step=step, seconds={}, rows=rows)
        rewards.append(batch.metrics["reward"])
        [share] = shares_of(batch, 1, arm.settings)
        mine = mini_batches(share, {group.index: group.record for group in groups})
        learner.step({0: mine}, {0: step}, 1)
        for key, parameter in adapter_parameters(policy).items():
            parameter.data.copy_(arm.parameters[key].detach())
    assert fmean(rewards[:3]) < 0.62
    assert fmean(rewards[-3:]) > 0.75
