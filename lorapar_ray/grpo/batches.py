"""Groups as a step's batch, advantages included, and each learner's share of it: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.grpo.advantages import group_advantages
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.samples import Batch, MiniBatch, Sample

EXAMPLES_PER_STEP = 2


def make_batch(
    groups: Sequence[Group],
    dropped: Sequence[Group],
    settings: GrpoConfig,
    prompts: list[int],
    step: int,
    seconds: dict[str, float],
) -> Batch:
    """Advantages per group, metrics over every sampled group, and a few completions to read.

    Metrics count the dropped groups too: a reward averaged over groups that happen to differ says nothing about the
    policy. `step` is the version that will train on the batch; `prompts` are all that were drawn for it.
    """
    import torch

    samples: list[Sample] = []
    if groups:
        rewards = torch.tensor([reward for group in groups for reward in group.rewards])
        advantages = group_advantages(rewards, settings.group_size, settings.advantage_scale).tolist()
        flat = [(group, completion) for group in groups for completion in group.completions]
        samples = [
            Sample(group.row["prompt_ids"], done.token_ids, done.logprobs, advantage, done.finished, done.version)
            for (group, done), advantage in zip(flat, advantages, strict=True)
            if done.finished or not settings.mask_truncated
        ]
    everything = [*groups, *dropped]
    lengths = [len(done.token_ids) for group in everything for done in group.completions]
    finished = [done.finished for group in everything for done in group.completions]
    lag = [step - done.version for group in everything for done in group.completions]
    metrics = {
        "reward": fmean(reward for group in everything for reward in group.rewards),
        "reward_std": fmean(group.spread for group in everything),
        "completion_length": fmean(lengths),
        "truncated_share": 1 - fmean(finished),
        "zero_variance_share": len(dropped) / len(everything),
        "reward_failures": float(sum(group.failures for group in everything)),
        "groups": float(len(everything)),
        "staleness": fmean(lag),
        "staleness_max": float(max(lag)),
        "rollout_tokens_per_s": sum(lengths) / max(1e-9, seconds.get("rollout", 0.0)),
        "seconds/reward": fmean(group.reward_seconds for group in everything),
        **{f"seconds/{phase}": spent for phase, spent in seconds.items()},
    }
    for name in everything[0].parts:
        values = [value for group in everything for value in group.parts[name] if value is not None]
        metrics[f"reward/{name}"] = fmean(values) if values else 0.0
    return Batch(
        samples=samples,
        tokens=sum(len(sample.token_ids) for sample in samples),
        count=len(samples),
        metrics=metrics,
        examples=[_example(group) for group in everything[:EXAMPLES_PER_STEP]],
        prompts=list(prompts),
    )


def share_of(batch: Batch, rank: int, world: int, mini_batch: int | None = None) -> Batch:
    """One learner's part of a batch: whole groups, so that a prompt is computed once, and of balanced length.

    Args:
        mini_batch: groups of one update, over all learners; None: all of them.
    """
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for sample in batch.samples:
        groups.setdefault(tuple(sample.prompt_ids), []).append(sample)
    together = list(groups.values())
    size = mini_batch or max(1, len(together))
    parts = [_mini_batch(together[start : start + size], rank, world) for start in range(0, len(together), size)]
    return replace(batch, samples=[sample for part in parts for sample in part.samples], mini_batches=parts)


def _mini_batch(groups: list[list[Sample]], rank: int, world: int) -> MiniBatch:
    lengths = [sum(len(sample.token_ids) for sample in group) for group in groups]
    ordered = [group for _, group in sorted(zip(lengths, groups, strict=True), key=lambda pair: pair[0])]
    own = [sample for group in ordered[rank::world] for sample in group]
    return MiniBatch(own, tokens=sum(lengths), count=sum(map(len, groups)))


def _example(group: Group) -> dict[str, Any]:
    best = max(range(len(group.rewards)), key=group.rewards.__getitem__)
    return {
        "prompt": group.row["prompt"],
        "completion": group.texts[best],
        "answer": group.row["answer"],
        "reward": group.rewards[best],
    }
