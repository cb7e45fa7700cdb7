"""Stage `grpo`, and the teachers that grade for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorapar_ray.config.base import (
    Betas,
    Distinct,
    Fraction,
    NonNegative,
    Optional0,
    PositiveFloat,
    PositiveInt,
    Section,
    StopStrings,
    System,
    Tracker,
    names_in,
    require_last_words,
)
from lorapar_ray.config.engine import EngineConfig, Resources, require_gpu_for_each_rank
from lorapar_ray.config.marks import Operation, Result, result_but_not
from lorapar_ray.config.sandbox import SandboxConfig

JUDGE = "judge"
"""The reward that asks teachers."""
ENVIRONMENT = "environment"
"""The reward that an environment gives its own trajectories."""
REWARDED_ELSEWHERE = (JUDGE, ENVIRONMENT)
"""Rewards that no reward worker computes."""


class RewardConfig(Section):
    """One reward: a registered name or `module:function`, and its weight in the sum."""

    name: Result[str]
    """A registered reward, or `module:function`; `environment`: what `grpo.environment` gives its trajectories."""
    weight: Result[float] = 1.0
    """In the sum of rewards."""
    isolate: Operation[bool] = False
    """Run a function of yours in the sandbox: it can import what this process can, and has no network, no environment
    variables and no other files. Not for `code_tests`, which puts the programs that it tests there."""


class JudgeConfig(Section):
    """The reward `judge`: teachers of `label.teachers` grade completions; 0 is the lowest grade, 1 the best."""

    teachers: Result[list[str]] = []
    """By name; empty: all of them. The mean of those that answer counts."""
    grades: Result[Annotated[int, Field(ge=2, le=9)]] = 5
    """From 1 to this."""
    prompt: Result[str] = (
        "Grade an answer to a question from 1 (wrong or useless) to {grades} (right and clear).\n\n"
        "Question: {question}\nReference answer: {answer}\nAnswer to grade: {completion}"
    )
    """What a teacher reads; `{names}` are filled in."""
    choice: Result[str] = "Grade:"
    """The last word of the prompt; the grade is the next token."""
    time_limit_s: Operation[PositiveFloat] = 60.0
    """For one teacher's grade, retries included."""

    @model_validator(mode="after")
    def _names_are_known(self) -> JudgeConfig:
        found = names_in(self.prompt, "prompt")
        if "completion" not in found or not found <= {"question", "answer", "completion", "grades"}:
            raise ValueError("prompt: takes {question}, {answer}, {grades} and, always, {completion}")
        require_last_words(self.choice)
        return self


class GrpoConfig(Section):
    """Stage 2: GRPO of the System 2 region on System 2 prompts, starting from stage 1's adapter."""

    systems: Result[Annotated[Distinct[System], Field(min_length=1)]] = [2]
    """Prompts of these Systems are sampled."""
    masked: Result[bool] = True
    """False: every element trains."""
    steps: Result[PositiveInt | None] = None
    """None: one pass over the prompts."""
    prompts_per_step: Result[PositiveInt] = 8
    """Groups that one step is made of, over all learners."""
    balance: Result[Literal["off", "auto"]] = "off"
    """`auto`: prompts of a step move between `balance_prompts`, beginning with `prompts_per_step`, to as few as come to
    0.95 of the samples per second that large steps would; see `lorapar_ray/grpo/balance.py`. It follows the clock, so
    two runs differ; `steps` must be set."""
    balance_prompts: Result[tuple[PositiveInt, PositiveInt] | None] = None
    """Fewest and most prompts of a step under `balance: auto`; None: from `prompts_per_step` to eight times as many."""
    group_size: Result[Annotated[int, Field(ge=2)]] = 8
    """Completions of one prompt."""
    max_prompt_length: Result[PositiveInt] = 256
    """Tokens; a longer prompt is listed in `rejects/` and left out."""
    max_completion_length: Result[PositiveInt] = 256
    """Tokens at which sampling stops; with an environment of a whole trajectory, what the environment puts in
    included."""
    temperature: Result[PositiveFloat] = 1.0
    """Of sampling, and of the learner's probabilities."""
    top_k: Result[Optional0] = 0
    """Sample from the likeliest so many tokens; 0: from all. What top_k, `top_p` and `min_p` leave to sample from goes
    to the learner with each token, which normalises over the same ones; so ratios are those of the distribution that
    was sampled from, and the KL divergence of `kl_beta` is taken over it too."""
    top_p: Result[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Sample from the likeliest tokens that together have this probability; below 1 `top_k` must be set, which bounds
    how many travel."""
    min_p: Result[Fraction] = 0.0
    """Sample from tokens with at least this share of the likeliest one's probability; above 0 `top_k` must be set."""
    stop: Result[StopStrings] = []
    """Strings at which a completion ends."""
    rewards: Result[Annotated[list[RewardConfig], Field(min_length=1)]] = [RewardConfig(name="numeric_answer")]
    """Their weighted sum is a completion's reward. By convention the first is the one for a right answer."""
    environment: Result[str | None] = None
    """`module:function`, an async `rollout(engine, row)` that plays one sample over several turns, with tools if it
    likes; see the tutorial. None: a completion is one answer."""
    environment_workers: Operation[PositiveInt] = 1
    """Ray actors in which episodes run, each many at once."""
    environment_time_limit_s: Operation[PositiveFloat] = 60.0
    """What an episode may do without the engine at one go; then its sample is lost, or, if it blocks the event loop,
    the worker is replaced."""
    environment_resources: Operation[Resources] = Resources(cpus=0, gpus=0)
    """Of one environment worker."""
    judge: Result[JudgeConfig] = JudgeConfig()
    """How the reward `judge` grades; needs `label.teachers`."""
    reward_time_limit_s: Operation[PositiveFloat] = 5.0
    """For one call of the rewards. A batch that takes longer is halved; a sample that does counts 0."""
    reward_memory_mb: Operation[PositiveInt] = 1024
    """Of a reward process."""
    reward_workers: Operation[PositiveInt] = 1
    """Ray actors that compute rewards, each with processes of its own."""
    reward_resources: Operation[Resources] = Resources(cpus=0, gpus=0)
    """Of one reward worker."""
    sandbox: Operation[SandboxConfig] = SandboxConfig()
    """For the reward `code_tests` and for rewards with `isolate`."""
    overlong_cache: Result[Optional0] = 0
    """DAPO's soft punishment: completions within this many tokens of the limit lose up to 1; 0 turns it off."""
    loss: Result[Literal["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"]] = "dapo"
    """How tokens are weighted, see `lorapar_ray.grpo.loss.policy_loss`."""
    clip_low: Result[NonNegative] = 0.2
    clip_high: Result[NonNegative] = 0.28
    """Bounds of the ratio to the old policy (`old_policy`); `cispo` caps the ratio at `clip_high` itself, at least 1.
    With one update per batch and the learner's old policy that ratio is 1: nothing is clipped and `gspo` has the
    gradient of `grpo`. How far the sampler lags behind (`max_staleness`) is then corrected by `importance_cap` and
    `sequence_ratio_bounds`."""
    mini_batch: Result[PositiveInt | None] = None
    """Prompts of one update, over all learners; None: all of the step's."""
    updates_per_batch: Result[PositiveInt | None] = None
    """Optimiser updates on each step's samples; None: as many as see each sample once. More go round again."""
    old_policy: Result[Literal["learner", "sampler"]] = "learner"
    """What the clipped ratio is taken against: the learner as it was before the step's first update, with the sampler
    corrected by `importance_cap`; or the sampler itself, as asynchronous trainers do, in one ratio."""
    nonfinite_limit: Operation[PositiveInt] = 3
    """Updates in a row that may be skipped because the loss or its gradient is not finite; then the run stops."""
    kl_beta: Result[NonNegative] = 0.0
    """Weight of the KL divergence from the policy that stage 2 began with."""
    importance_cap: Result[PositiveFloat | None] = 2.0
    """Truncated importance sampling against the sampler's own log-probabilities; None turns it off, which
    `max_staleness` above 0 forbids."""
    sequence_ratio_bounds: Result[tuple[NonNegative, PositiveFloat] | None] = None
    """Leave out completions whose mean learner/sampler ratio lies outside; None keeps all."""
    advantage_scale: Result[Literal["group", "batch", "none"]] = "group"
    """What a group's centred rewards are divided by: the group's standard deviation, the batch's, or nothing."""
    mask_truncated: Result[bool] = False
    """Leave completions that were cut at the length limit out of the loss."""
    refill_limit: Result[Optional0] = 2
    """Further sampling rounds per step to replace groups whose rewards are all equal."""
    curriculum: Result[Literal["none", "solve_rate"]] = "none"
    """`solve_rate`: from the second epoch on, prompts solved about half of the time come first."""
    learning_rate: Result[PositiveFloat] = 5e-6
    """The highest, after the warm-up."""
    schedule: Result[Literal["cosine", "linear", "constant"]] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: Result[Fraction] = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: Result[NonNegative] = 0.1
    """Decoupled (AdamW), of the elements that train."""
    betas: Result[Betas] = (0.9, 0.99)
    """Of AdamW's two moments."""
    max_grad_norm: Result[PositiveFloat] = 0.1
    """The gradient of the elements that train is clipped to this norm."""
    micro_batch_tokens: Operation[PositiveInt | None] = None
    """Tokens, prompts included, in one forward and backward pass; None: what the device's memory holds, by measure. A
    group that is larger is cut; a sample that is larger goes alone."""
    micro_batch_size: Operation[PositiveInt | None] = None
    """At most so many completions in one pass as well; None: no such limit."""
    gradient_checkpointing: Operation[bool | None] = None
    """Compute activations again in the backward pass instead of keeping them: half as much time again for a small part
    of the memory. None: if the longest sample would not fit without."""
    checkpoint_every: Operation[PositiveInt] = 10
    """Steps between two checkpoints."""
    max_staleness: Result[Optional0] = 0
    """Versions a sample's policy may lag behind the learner's; 0 is strictly on-policy."""
    drain: Result[bool] = False
    """Let completions in flight end before a new policy is served, instead of going on under it."""
    sync: Operation[Literal["auto", "merged", "adapter"]] = "auto"
    """`merged`: engines serve base + s·BA as plain weights; `adapter`: vLLM's own LoRA. `auto`: `adapter` on GPUs,
    where only the adapter is loaded and the base is not rounded again, and `merged` on CPUs, where LoRA kernels slow
    every decoding step (`jobs/benchmarks/weight_sync.py`)."""
    canary_tolerance: Operation[PositiveFloat | Literal["auto"]] = "auto"
    """Largest mean absolute log-probability gap (nats) between learner and engine on the canary tokens. `auto`: eight
    times the gap on the bare base, measured before a policy is served, and at least what `dtype` rounds away."""
    rollout_actors: Operation[PositiveInt] = 1
    """Engines that sample."""
    rollout_time_limit_s: Operation[PositiveFloat] = 900.0
    """An engine that takes longer to say that it lives, or to load a policy and prove it, hangs, and is replaced. How
    long its groups take does not count."""
    learners: Operation[PositiveInt] = 1
    """Training workers that share each step's samples."""
    sharding: Operation[Literal["none", "fsdp2"]] = "none"
    """`fsdp2`: cut the frozen base over the learners, for a base that does not fit one device."""
    report_to: Operation[Distinct[Tracker]] = []
    """Trackers that get the curves, beside `metrics/grpo.jsonl`."""
    rollout_placement: Operation[Literal["pack", "spread"]] = "pack"
    """Engines on few nodes or on many; see `lorapar_ray/grpo/placement.py` also for sharing GPUs with learners."""
    rollout_engine: Annotated[EngineConfig, result_but_not("max_model_len")] = EngineConfig()
    """Its `max_model_len` holds every sample, or the config is refused; so it decides nothing."""
    rollout_resources: Operation[Resources] = Resources()
    """Of one engine."""
    learner_resources: Operation[Resources] = Resources()
    """Of one learner."""

    @model_validator(mode="after")
    def _kept_tokens_are_bounded(self) -> GrpoConfig:
        cut = "top_p" if self.top_p < 1 else "min_p" if self.min_p > 0 else None
        if cut is not None and not self.top_k:
            raise ValueError(
                f"{cut}: set top_k as well, such as 50; at most so many tokens for each sampled one go to the learner, "
                "which needs them for its ratios"
            )
        return self

    @model_validator(mode="after")
    def _bounds_enclose_something(self) -> GrpoConfig:
        bounds = self.sequence_ratio_bounds
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(
                f"sequence_ratio_bounds: [{bounds[0]:g}, {bounds[1]:g}] is empty; give the lower one first"
            )
        if self.overlong_cache > self.max_completion_length:
            raise ValueError(f"overlong_cache: {self.overlong_cache} is more than max_completion_length")
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: every weight is 0, so no completion would be better than another")
        if self.environment is None and any(reward.name == ENVIRONMENT for reward in self.rewards):
            raise ValueError(
                f"rewards: '{ENVIRONMENT}' is what grpo.environment gives its trajectories; name one there"
            )
        return self

    @model_validator(mode="after")
    def _balance_is_bounded(self) -> GrpoConfig:
        low, high = self.balance_bounds
        if not low <= self.prompts_per_step <= high:
            raise ValueError(
                f"balance_prompts: [{low}, {high}] does not hold prompts_per_step ({self.prompts_per_step}); "
                "give the fewest first"
            )
        if self.balance == "auto" and self.steps is None:
            raise ValueError("balance: set steps too, since how many make one pass is not known before")
        return self

    @property
    def balance_bounds(self) -> tuple[int, int]:
        """Fewest and most prompts of a step under `balance: auto`."""
        return self.balance_prompts or (self.prompts_per_step, 8 * self.prompts_per_step)

    @model_validator(mode="after")
    def _stale_samples_are_corrected(self) -> GrpoConfig:
        if self.max_staleness > 0 and self.importance_cap is None and self.old_policy == "learner":
            raise ValueError(
                "importance_cap: nothing else corrects the stale samples of max_staleness above 0; set one"
            )
        return self

    @model_validator(mode="after")
    def _engine_holds_a_sample(self) -> GrpoConfig:
        longest, room = self.max_prompt_length + self.max_completion_length, self.rollout_engine.max_model_len
        if longest > room:
            raise ValueError(
                f"rollout_engine.max_model_len: {room} is less than max_prompt_length + max_completion_length "
                f"({longest}); raise it"
            )
        return self

    @model_validator(mode="after")
    def _cap_keeps_the_ratio(self) -> GrpoConfig:
        if self.loss == "cispo" and self.clip_high < 1:
            raise ValueError(
                f"clip_high: {self.clip_high:g} would shrink every gradient under loss cispo; set 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _one_engine_a_gpu(self) -> GrpoConfig:
        require_gpu_for_each_rank("rollout_resources", self.rollout_resources, "rollout_engine", self.rollout_engine)
        engine, learner = self.rollout_resources.gpu_count, self.learner_resources.gpu_count
        left = 1 - engine
        shared = max(self.rollout_actors, self.learners) > 1 and 0 < engine < 1 and 0 < learner < 1
        if shared and not (engine > 0.5 and left / 2 + 1e-9 < learner <= left + 1e-9):
            raise ValueError(
                f"rollout_resources.gpus: {engine:g} beside learners' {learner:g}; to put one engine and one learner "
                "on each GPU give engines more than 0.5 and learners the rest"
            )
        return self

    @property
    def judged(self) -> bool:
        """Whether teachers grade completions."""
        return any(reward.name == JUDGE for reward in self.rewards)
