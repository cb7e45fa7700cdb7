"""A step's groups as its batch, each learner's share of it, and that share's samples: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.record import GroupRecord
from lorapar_ray.grpo.advantages import group_advantages
from lorapar_ray.grpo.dealing import deal
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.samples import MiniBatch, Sample

EXAMPLES_PER_STEP = 2


@dataclass(frozen=True)
class Example:
    """The best completion of a group, for people to read."""

    prompt: str
    answer: str
    record: Any
    """Reference to the group's record."""
    completion: int
    reward: float


@dataclass(frozen=True)
class Batch:
    """Groups of one step, and what happened while they were made; what the coordinator keeps of it."""

    groups: list[Group]
    """Groups that are trained on."""
    metrics: dict[str, float]
    examples: list[Example]
    prompts: list[int]
    """Every prompt index the step drew, dropped groups included."""


@dataclass(frozen=True)
class Part:
    """Completions of one group that one learner trains on."""

    group: int
    """Its number in the batch."""
    record: Any
    """Reference to the group's record."""
    completions: list[int]
    advantages: list[float]


@dataclass(frozen=True)
class UpdateShare:
    """One learner's part of one update."""

    parts: list[Part]
    tokens: int
    """Completion tokens of the update, over all learners."""
    count: int
    """Samples of the update, over all learners."""


@dataclass(frozen=True)
class Share:
    """One learner's part of a batch: references, no tokens."""

    updates: list[UpdateShare]
    tokens: int
    """Completion tokens of the whole step, over all learners."""
    metrics: dict[str, float] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)


def make_batch(
    groups: Sequence[Group],
    dropped: Sequence[Group],
    prompts: list[int],
    step: int,
    seconds: dict[str, float],
    rows: Sequence[Mapping[str, Any]],
) -> Batch:
    """Metrics over every sampled group, and a few completions to read.

    Metrics count the dropped groups too: a mean reward over only the groups with different rewards would not describe
    the policy. `step` is the version that will train on the batch; `prompts` are all that were drawn for it; `rows` are
    the run's.
    """
    everything = [*groups, *dropped]
    lengths = [length for group in everything for length in group.head.trained]
    finished = [each for group in everything for each in group.head.finished]
    lag = [step - version for group in everything for version in group.head.versions]
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
    for name in {name: None for group in everything for name in group.parts}:
        values = [value for group in everything for value in group.parts.get(name, ()) if value is not None]
        metrics[f"reward/{name}"] = fmean(values) if values else 0.0
    if turns := [each for group in everything for each in group.head.turns]:
        metrics |= {
            "turns": fmean(turns),
            "trajectory_length": fmean(length for group in everything for length in group.head.answers),
            "environment_failures": float(sum(len(group.head.lost) for group in everything)),
        }
    told = [group for group in everything if group.rewards]
    examples = [_example(group, rows[group.index]) for group in told[:EXAMPLES_PER_STEP]]
    return Batch(list(groups), metrics, examples, list(prompts))


def shares_of(batch: Batch, learners: int, settings: GrpoConfig, packed: bool = True) -> list[Share]:
    """Every learner's part of a batch, with the samples' advantages; see `deal` for how even the parts are."""
    groups = batch.groups
    chosen = [_trained_on(group, settings) for group in groups]
    advantages = _advantages(groups, settings)
    size = settings.mini_batch or max(1, len(groups))
    updates: list[list[UpdateShare]] = [[] for _ in range(learners)]
    tokens = 0
    for start in range(0, len(groups), size):
        numbers = range(start, min(start + size, len(groups)))
        heads = [groups[number].head for number in numbers]
        own = [chosen[number] for number in numbers]
        lengths = [head.trained[each] for head, completions in zip(heads, own, strict=True) for each in completions]
        tokens += sum(lengths)
        for learner, hand in enumerate(deal(heads, own, learners, packed)):
            parts = [
                Part(start + at, groups[start + at].record, mine, [advantages[start + at][each] for each in mine])
                for at, mine in hand.items()
            ]
            updates[learner].append(UpdateShare(parts, sum(lengths), len(lengths)))
    return [Share(each, tokens, batch.metrics, batch.examples, batch.prompts) for each in updates]


def mini_batches(share: Share, records: Mapping[int, GroupRecord]) -> list[MiniBatch]:
    """A learner's share with its samples; updates without any sample on all learners are skipped.

    Args:
        records: by number of the group.
    """
    found = []
    for update in share.updates:
        samples = [sample for part in update.parts for sample in _samples(part, records[part.group])]
        if update.count:
            found.append(MiniBatch(samples, update.tokens, update.count))
    return found


def _samples(part: Part, record: GroupRecord) -> list[Sample]:
    completions, masks, kept, head = record.completions(), record.masks(), record.kept_sets(), record.head
    return [
        Sample(
            record.prompt_ids,
            *completions[each],
            advantage,
            head.finished[each],
            head.versions[each],
            masks[each],
            kept[each],
        )
        for each, advantage in zip(part.completions, part.advantages, strict=True)
    ]


def _trained_on(group: Group, settings: GrpoConfig) -> list[int]:
    finished = group.head.finished
    return [each for each in range(len(finished)) if finished[each] or not settings.mask_truncated]


def _advantages(groups: Sequence[Group], settings: GrpoConfig) -> list[list[float]]:
    import torch

    if not groups:
        return []
    rewards = torch.tensor([reward for group in groups for reward in group.rewards])
    sizes = [len(group.rewards) for group in groups]  # an environment may have lost some
    found = group_advantages(rewards, sizes, settings.advantage_scale)
    return [each.tolist() for each in found.split(sizes)]


def _example(group: Group, row: Mapping[str, Any]) -> Example:
    best = max(range(len(group.rewards)), key=group.rewards.__getitem__)
    return Example(row["prompt"], row["answer"], group.record, best, group.rewards[best])
