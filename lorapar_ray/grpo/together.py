"""Stage 2 of several runs at once: their adapters train on one frozen base, and share rollout engines.

Each engine serves every run's current policy as a LoRA adapter of its own, and groups of all runs fill its batches.
Each run keeps its prompts, rewards, versions, digests, canaries and staleness bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorapar_ray.capacity import needing
from lorapar_ray.config import Config
from lorapar_ray.grpo.stage import STAGE
from lorapar_ray.grpo.worker import learn_arms_worker
from lorapar_ray.progress import progress
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.together import adapter_alone, require_one_base, stage_shape
from lorapar_ray.tracking import notices_of

if TYPE_CHECKING:
    from lorapar_ray.grpo.job import Stage2

OWN = {
    *("systems", "masked", "steps", "prompts_per_step", "balance", "balance_prompts", "group_size", "rewards"),
    *("overlong_cache", "loss", "clip_low", "clip_high", "mini_batch", "updates_per_batch", "old_policy"),
    *("nonfinite_limit", "kl_beta", "importance_cap", "sequence_ratio_bounds", "advantage_scale", "mask_truncated"),
    *("refill_limit", "curriculum", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "betas"),
    *("max_grad_norm", "checkpoint_every", "max_staleness", "drain", "canary_tolerance", "report_to", "reward_workers"),
}
"""Settings of `grpo` that may differ between runs that train together."""


def why_alone(config: Config) -> str | None:
    """The setting that prevents a run's stage 2 from sharing a base with other runs; None: it can share."""
    from lorapar_ray.grpo.shards import shard_count

    grpo = config.grpo
    if why := adapter_alone(config):
        return why
    if grpo.sharding != "none":
        return f"grpo.sharding: {grpo.sharding}"
    if grpo.sequence_parallel > 1:
        return f"grpo.sequence_parallel: {grpo.sequence_parallel}"
    if grpo.sync == "merged":  # an engine has one set of merged weights
        return f"grpo.sync: {grpo.sync}"
    if grpo.environment is not None:
        return f"grpo.environment: {grpo.environment}"
    if grpo.judged:
        return "grpo.rewards: judge"
    if shard_count(grpo) > 1:
        return f"grpo.rollout_shards: {shard_count(grpo)}"
    return None


def shape_of(config: Config) -> str:
    """A digest that is equal for runs whose stage 2 can train together: base, rank, targets, engines, learners."""
    return stage_shape(config, config.grpo, OWN)


def train_together(members: Sequence[tuple[Config, RunDirectory]]) -> list[dict[str, Any]]:
    """`train_stage2` of every run; each gets the files that it would get alone.

    Args:
        members: of one `shape_of`, and `why_alone` None.

    Returns: each one's notes for the manifest.

    Raises:
        UserError: as `train_stage2`, of any of them; or their residual bases differ, or the model's attention cannot be
            packed.
    """
    from lorapar_ray.grpo.job import stage2

    stages = [stage2(_by_adapter(config), run) for config, run in members]
    require_one_base([(stage.run, stage.job.base) for stage in stages])
    if not all(stage.trained for stage in stages):
        _train(stages)
    for stage in stages:
        stage.finish()
    return [stage.notes for stage in stages]


def _train(stages: Sequence[Stage2]) -> None:
    """Take the steps that are left, and write the adapters. An adapter that is already written is written again, after
    the steps since its run's last checkpoint."""
    from lorapar_ray.grpo.coordinators import Coordinators
    from lorapar_ray.grpo.job import run_learners, steps_done

    jobs = [stage.job for stage in stages]
    steps, metrics = sum(job.steps for job in jobs), [job.metrics for job in jobs]
    with (
        needing("grpo", STAGE.groups(stages[0].config)),
        progress(f"grpo × {len(jobs)}", steps, lambda: steps_done(*metrics), [*map(notices_of, metrics)]),
    ):
        run_learners(
            stages[0],
            Coordinators,
            [stage.plan for stage in stages],
            learn_arms_worker,
            {"jobs": [job.payload() for job in jobs]},
            [],  # runs of a grid are on a shared disk
        )


def _by_adapter(config: Config) -> Config:
    """The config with `grpo.sync: adapter`, by which one engine can serve several policies."""
    return config.model_copy(update={"grpo": config.grpo.model_copy(update={"sync": "adapter"})})
