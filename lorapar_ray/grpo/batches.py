"""What passes between engines, rewards and learners in one GRPO step, and the pure steps between them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import sqrt
from statistics import fmean
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.completion import Completion
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.advantages import group_advantages, overlong_penalty
from lorapar_ray.grpo.rewards import RewardBatch
from lorapar_ray.grpo.samples import MiniBatch, Sample

EXAMPLES_PER_STEP = 2
CANARY_FACTOR = 8.0
"""A measured tolerance in gaps on the bare base: policies that were trained further have been seen to triple it."""
MOST_TOLERANCE = 0.5
"""Nats; a gap on the bare base of this size is no numerics: learner and engine have different models."""


@dataclass
class Group:
    """One prompt, its completions, and (once scored) their rewards."""

    row: dict[str, Any]
    completions: list[Completion]
    texts: list[str]
    rewards: list[float] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    failures: int = 0
    """Samples on which a reward failed."""
    failed: dict[str, int] = field(default_factory=dict)
    """Samples lost by reward."""
    errors: dict[str, str] = field(default_factory=dict)
    """Text of the first failure by reward."""
    reward_seconds: float = 0.0

    def take(self, scored: RewardBatch, settings: GrpoConfig) -> None:
        """Fill in what the reward workers found, and the overlong penalty if there is one."""
        self.rewards, self.parts, self.failures = scored.total, scored.parts, sum(scored.failures.values())
        self.failed, self.errors = scored.failed, scored.errors
        if settings.overlong_cache:
            lengths = [len(done.token_ids) for done in self.completions]
            limits = settings.max_completion_length, settings.overlong_cache
            penalties = [overlong_penalty(length, *limits) for length in lengths]
            self.rewards = [reward + penalty for reward, penalty in zip(self.rewards, penalties, strict=True)]
            self.parts = {**self.parts, "overlong": list(penalties)}

    @property
    def spread(self) -> float:
        """Standard deviation of the rewards: 0 means the group has no advantage to learn from."""
        if min(self.rewards) == max(self.rewards):
            return 0.0  # not a rounding error of the mean
        mean = fmean(self.rewards)
        return sqrt(fmean((reward - mean) ** 2 for reward in self.rewards))

    @property
    def solved(self) -> float:
        """Mean of the first reward (the one for a right answer, by convention), in [0, 1]."""
        values = [value or 0.0 for value in next(iter(self.parts.values()))]
        return min(1.0, max(0.0, fmean(values)))


@dataclass(frozen=True)
class Batch:
    """Samples of one step (or one learner's share), and what happened while they were made."""

    samples: list[Sample]
    tokens: int
    """Completion tokens of the whole step, over all learners."""
    count: int
    """Samples of the whole step, over all learners."""
    metrics: dict[str, float]
    examples: list[dict[str, Any]]
    prompts: list[int]
    """Every prompt index the step drew, dropped groups included."""
    mini_batches: list[MiniBatch] = field(default_factory=list)
    """One learner's share, as it is trained on; none: all of it at once."""


@dataclass(frozen=True)
class Canary:
    """Tokens whose log-probabilities the learner and every engine must agree on."""

    token_ids: list[int]
    start: int
    logprobs: list[float]
    """The learner's, of `token_ids[start:]`."""


def canary_gap(canaries: Sequence[Canary], scored: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference, in nats, between the learner's and an engine's log-probabilities of the canaries."""
    gaps = [
        abs(ours - theirs)
        for canary, engine in zip(canaries, scored, strict=True)
        for ours, theirs in zip(canary.logprobs, engine, strict=True)
    ]
    return fmean(gaps) if gaps else 0.0


def canary_tolerance(base_gap: float, least: float) -> float:
    """The canary tolerance of a run, in nats, from the gap that numerics make on the bare base.

    Raises:
        UserError: the gap is too large for one model.
    """
    if not base_gap <= MOST_TOLERANCE:
        raise UserError(
            f"grpo: on the bare base the learner and the engine are {base_gap:.3f} nats apart, so they do not have the "
            "same model; see model.dtype, model.quantization and grpo.rollout_engine, or set grpo.canary_tolerance to "
            "a number"
        )
    return min(MOST_TOLERANCE, max(least, CANARY_FACTOR * base_gap))


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


class Clock:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock time to `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
