"""Stage `grpo`, and the teachers that grade its completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

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
from lorapar_ray.config.engine import EngineConfig, Resources, require_apart, require_gpu_for_each_rank
from lorapar_ray.config.marks import Operation, Result, result_but_not
from lorapar_ray.config.ranges import NumberOrRange, Ranged, require_no_range_by_node
from lorapar_ray.config.sandbox import SandboxConfig

JUDGE = "judge"
"""The reward that asks teachers."""
ENVIRONMENT = "environment"
"""The reward that an environment gives its own trajectories."""
LEAST_TEMPERATURE = 0.01
"""vLLM raises lower ones to it (`vllm.sampling_params._MAX_TEMP`)."""
REWARDED_ELSEWHERE = (JUDGE, ENVIRONMENT)
"""Rewards that no reward worker computes."""


class RewardConfig(Section):
    """One reward: a registered name or `module:function`, and its weight in the sum."""

    name: Result[str]
    """A registered reward, or `module:function`; `environment`: the reward that `grpo.environment` sets on its
    trajectories."""
    weight: Result[float] = 1.0
    """Weight in the sum of rewards."""
    isolate: Operation[bool] = False
    """Run your function in the sandbox: it can import the same modules as this process, and has no network, no
    environment variables and no other files. Not for `code_tests`, which already runs the tested programs there."""


class JudgeConfig(Section):
    """The reward `judge`: teachers of `label.teachers` grade completions; 0 is the lowest grade, 1 the best."""

    teachers: Result[list[str]] = []
    """Names of the grading teachers; empty: all. The reward is the mean grade of those that answer."""
    grades: Result[Annotated[int, Field(ge=2, le=9)]] = 5
    """Number of grades: 1 to this."""
    prompt: Result[str] = (
        "Grade an answer to a question from 1 (wrong or useless) to {grades} (right and clear).\n\n"
        "Question: {question}\nReference answer: {answer}\nAnswer to grade: {completion}"
    )
    """The grading prompt; `{names}` are filled in."""
    choice: Result[str] = "Grade:"
    """The last word of the prompt; the grade is the next token."""
    time_limit_s: Operation[PositiveFloat] = 60.0
    """Time limit for one teacher's grade, retries included; waiting for `requests_per_second` does not count."""

    @model_validator(mode="after")
    def _names_are_known(self) -> JudgeConfig:
        found = names_in(self.prompt, "prompt")
        if "completion" not in found or not found <= {"question", "answer", "completion", "grades"}:
            raise ValueError("prompt: takes {question}, {answer}, {grades} and, always, {completion}")
        require_last_words(self.choice)
        return self


class GrpoConfig(Ranged):
    """Stage 2: GRPO of the System 2 region on System 2 prompts, starting from stage 1's adapter."""

    systems: Result[Annotated[Distinct[System], Field(min_length=1)]] = [2]
    """Systems whose prompts are sampled."""
    masked: Result[bool] = True
    """Train only the stage's region; False: every element trains."""
    steps: Result[PositiveInt | None] = None
    """Training steps; None: one pass over the prompts."""
    prompts_per_step: Result[PositiveInt] = 8
    """Groups in one step, over all learners."""
    balance: Result[Literal["off", "auto"]] = "off"
    """`auto`: the number of prompts per step changes within `balance_prompts`, starting at `prompts_per_step`. It
    becomes the smallest number that reaches 0.95 of the samples per second of large steps; see
    `lorapar_ray/grpo/balance.py`. It depends on measured times, so two runs differ; `steps` must be set. It moves no
    resources: the numbers of engines and learners stay as you set them."""
    balance_prompts: Result[tuple[PositiveInt, PositiveInt] | None] = None
    """Smallest and largest number of prompts per step with `balance: auto`; None: `prompts_per_step` to eight times as
    many."""
    group_size: Result[Annotated[int, Field(ge=2)]] = 8
    """Completions of one prompt."""
    max_prompt_length: Result[PositiveInt] = 256
    """Longest prompt, in tokens; longer ones are skipped and listed in `rejects/`."""
    max_completion_length: Result[PositiveInt] = 256
    """Longest completion, in tokens. With an environment: of the whole trajectory, including the environment's
    tokens."""
    temperature: Result[PositiveFloat] = 1.0
    """Temperature of sampling and of the learner's probabilities; at least 0.01, as in vLLM."""
    top_k: Result[Annotated[int, Field(ge=0, le=1000)]] = 0
    """Sample from the k most likely tokens; 0: from all. The set of tokens that top_k, `top_p` and `min_p` keep is sent
    to the learner with each sampled token. The learner normalises over the same set, so ratios, and the KL divergence
    of `kl_beta`, use the distribution that was sampled from."""
    top_p: Result[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Sample from the most likely tokens that together have this probability. Below 1 `top_k` must be set: it limits
    the number of tokens sent to the learner, which without it may be the whole vocabulary for each sampled token."""
    min_p: Result[Fraction] = 0.0
    """Sample from tokens with at least this fraction of the most likely token's probability; above 0 `top_k` must be
    set, for the same reason."""
    stop: Result[StopStrings] = []
    """Strings at which a completion ends."""
    rewards: Result[Annotated[list[RewardConfig], Field(min_length=1)]] = [RewardConfig(name="numeric_answer")]
    """A completion's reward is their weighted sum. By convention the first one rewards a right answer."""
    environment: Result[str | None] = None
    """`module:function`, an async `rollout(engine, row)` that runs one sample over several turns, optionally with
    tools; see the tutorial. Its slow groups stay on their engine: only groups of plain completions move to an idle one.
    None: a completion is one answer."""
    environment_workers: Operation[PositiveInt] = 1
    """Ray actors that run episodes; each runs many at once."""
    environment_time_limit_s: Operation[PositiveFloat] = 60.0
    """Longest time an episode may spend between two calls of the engine. After that its sample is dropped, or the
    worker is replaced if the episode blocks the event loop."""
    environment_resources: Operation[Resources] = Resources(cpus=0, gpus=0)
    """Resources of one environment worker."""
    judge: Result[JudgeConfig] = JudgeConfig()
    """How the reward `judge` grades; needs `label.teachers`."""
    reward_time_limit_s: Operation[PositiveFloat] = 5.0
    """Time limit for one call of the rewards. A batch that exceeds it is halved; a single sample that exceeds it gets
    0. A call of `code_tests` has more if its programs may take longer (`sandbox.time_limit_s`)."""
    reward_memory_mb: Operation[PositiveInt] = 1024
    """Memory limit of a reward process. Programs that `code_tests` runs have their own (`sandbox.memory_mb`)."""
    reward_workers: Operation[PositiveInt] = 1
    """Ray actors that compute rewards, each with its own processes."""
    reward_resources: Operation[Resources] = Resources(cpus=0, gpus=0)
    """Resources of one reward worker."""
    sandbox: Operation[SandboxConfig] = SandboxConfig()
    """For the reward `code_tests`, whose programs have these limits in full, as in evaluation. Rewards with `isolate`
    use the `layer`, and the limits of other rewards."""
    overlong_cache: Result[Optional0] = 0
    """DAPO's soft overlong punishment: completions within this many tokens of the limit lose up to 1; 0 turns it
    off."""
    loss: Result[Literal["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"]] = "dapo"
    """How tokens are weighted, see `lorapar_ray.grpo.loss.policy_loss`."""
    clip_low: Result[NonNegative] = 0.2
    """The ratio to the old policy is clipped below 1 − `clip_low`; see `clip_high`."""
    clip_high: Result[NonNegative] = 0.28
    """Bounds of the ratio to the old policy (`old_policy`); `cispo` caps the ratio at `clip_high` itself, at least 1.
    With one update per batch and `old_policy: learner` that ratio is 1: nothing is clipped and `gspo` has the gradient
    of `grpo`. Then `importance_cap` and `sequence_ratio_bounds` correct for the sampler's lag (`max_staleness`)."""
    mini_batch: Result[PositiveInt | None] = None
    """Prompts of one update, over all learners; None: all prompts of the step."""
    updates_per_batch: Result[PositiveInt | None] = None
    """Optimiser updates on each step's samples; None: one pass over the samples. A larger number repeats samples."""
    old_policy: Result[Literal["learner", "sampler"]] = "learner"
    """The old policy of the clipped ratio. `learner`: the learner before the step's first update; `importance_cap`
    corrects for the sampler. `sampler`: the sampler itself, in one ratio, as in asynchronous trainers."""
    nonfinite_limit: Operation[PositiveInt] = 3
    """Updates in a row that may be skipped because the loss or its gradient is not finite; then the run stops, at the
    end of the step."""
    kl_beta: Result[NonNegative] = 0.0
    """Weight of the KL divergence from the policy at the start of stage 2."""
    importance_cap: Result[PositiveFloat | None] = 2.0
    """Cap of truncated importance sampling against the sampler's log-probabilities; None turns it off, which is not
    allowed with `max_staleness` above 0."""
    sequence_ratio_bounds: Result[tuple[NonNegative, PositiveFloat] | None] = None
    """Drop completions whose mean learner/sampler ratio is outside these bounds; None keeps all. Their tokens still
    count in the divisor of the loss."""
    advantage_scale: Result[Literal["group", "batch", "none"]] = "group"
    """Divisor of a group's centred rewards: the group's standard deviation, the batch's, or none."""
    mask_truncated: Result[bool] = False
    """Exclude completions that were cut at the length limit from the loss."""
    refill_limit: Result[Optional0] = 2
    """Extra sampling rounds per step to replace groups whose rewards are all equal."""
    curriculum: Result[Literal["none", "solve_rate"]] = "none"
    """`solve_rate`: from the second epoch on, prompts with a solve rate near one half come first."""
    learning_rate: Result[PositiveFloat] = 5e-6
    """Highest learning rate, after the warm-up."""
    schedule: Result[Literal["cosine", "linear", "constant"]] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: Result[Fraction] = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: Result[NonNegative] = 0.1
    """Decoupled weight decay (AdamW) of the trained elements."""
    betas: Result[Betas] = (0.9, 0.99)
    """Betas of AdamW's two moments."""
    max_grad_norm: Result[PositiveFloat] = 0.1
    """The gradient of the trained elements is clipped to this norm."""
    micro_batch_tokens: Operation[PositiveInt | None] = None
    """Tokens, prompts and padding included, in one forward and backward pass; None: measured to fit the device's
    memory. A larger group is split; a larger sample gets its own pass. With `sequence_parallel` the learners of a pass
    share them."""
    micro_batch_size: Operation[PositiveInt | None] = None
    """Also at most this many completions in one pass; None: no limit."""
    gradient_checkpointing: Operation[bool | None] = None
    """Recompute activations in the backward pass instead of storing them: 1.5 times the time for a small part of the
    memory. None: only if the longest sample does not fit otherwise."""
    checkpoint_every: Operation[PositiveInt] = 10
    """Steps between two checkpoints."""
    max_staleness: Result[Optional0] = 0
    """Versions that a sample's policy may lag behind the learner's; 0 is strictly on-policy."""
    drain: Result[bool] = False
    """Finish completions in flight before serving a new policy. False: they continue with the new policy."""
    sync: Operation[Literal["auto", "merged", "adapter"]] = "auto"
    """`merged`: engines serve base + s·BA as plain weights; `adapter`: vLLM's own LoRA. `auto`: `adapter` on GPUs
    (loads only the adapter, does not round the base again), `merged` on CPUs (there LoRA products add to every decoding
    step; `jobs/benchmarks/weight_sync.py`). The device decides: to measure both, each engine would start twice."""
    canary_tolerance: Operation[PositiveFloat | Literal["auto"]] = "auto"
    """Largest mean absolute log-probability gap (nats) between learner and engine on the canary tokens. `auto`: eight
    times the gap on the base without an adapter, measured before a policy is served, and at least the rounding of
    `dtype`."""
    rollout_actors: Operation[NumberOrRange] = 1
    """Rollout engines. A range, `[1, 8]`: as many as the cluster has room for. An engine joins when there is a node for
    it, and when its node is lost the others take over its samples."""
    max_rollout_actors: Operation[PositiveInt | None] = None
    """The most engines, where `rollout_actors` is not a list: an older spelling of a range."""
    rollout_shards: Operation[PositiveInt | Literal["auto"]] = "auto"
    """Processes that send requests to engines and reward workers, each with its part of them. `auto`: one for every 64
    engines (the most of a range), if there are as many reward workers; else the stage says what limits it."""
    rollout_time_limit_s: Operation[PositiveFloat] = 900.0
    """Time limit for an engine's heartbeat, and for loading and checking a policy. An engine that exceeds it is
    replaced. The time of its groups does not count."""
    arms_at_once: Operation[PositiveInt] = 1
    """In a grid (`lorapar ablate`): the number of runs with equal base, rank, targets and engines whose stage 2 trains
    together, each with its own prompts, rewards and steps: on one frozen base, with engines that serve each run's
    policy as a LoRA adapter (`sync: adapter`). Each ends as it does alone, except for rounding. 1: one run after the
    other, which was faster on a CPU (see `jobs/benchmarks/arms.py`)."""
    learners: Operation[NumberOrRange] = 1
    """Training workers that share each step's samples. A range, `[1, 4]`: as many as the cluster has room for beside
    the engines. Room in which each reward worker, environment worker and judge could start again stays free. When nodes
    come or go, more or fewer learners resume from the last checkpoint; the fewest engines stay. The learners of a range
    share no GPU with engines: if `gpus: auto` finds too few GPUs for that, there are always the fewest."""
    max_learners: Operation[PositiveInt | None] = None
    """The most learners, where `learners` is not a list: an older spelling of a range."""
    sequence_parallel: Operation[PositiveInt] = 1
    """Learners that share each sequence, for contexts longer than one device's memory: each holds the activations of
    1 / `sequence_parallel` of the tokens. It must divide `learners` (both numbers of a range) and the model's attention
    heads. Consecutive learners share a sequence, so keep it within the GPUs of a node: they exchange data in every
    layer. See `lorapar_ray/sequence_parallel.py`."""
    sharding: Operation[Literal["none", "fsdp2", "hsdp"]] = "none"
    """Cut the frozen base, if it does not fit one device: `fsdp2` over all learners, `hsdp` over those of each node."""
    report_to: Operation[Distinct[Tracker]] = []
    """Trackers that get the curves, in addition to `metrics/grpo.jsonl`; see `sft.report_to`."""
    policy_transport: Operation[Literal["object_store", "direct"]] = "object_store"
    """How a policy gets from the learner to the engines. `object_store`: once to each node. `direct`: each engine reads
    it from the learner's memory, over RDMA where the network has it (Ray Direct Transport, an alpha feature; every node
    needs the package `nixl`). Then a thread of the first learner and of each engine polls on a core of its own, and
    NIXL's ports, like gloo's and NCCL's, ask for no token. The digest is checked in both cases."""
    rollout_placement: Operation[Literal["pack", "spread"]] = "pack"
    """Put engines on few nodes or on many; `lorapar_ray/grpo/placement.py` also describes sharing GPUs with
    learners."""
    rollout_engine: Annotated[EngineConfig, result_but_not("max_model_len")] = EngineConfig()
    """Settings of the rollout engines. `max_model_len` must hold every sample, so it does not change results."""
    rollout_resources: Operation[Resources] = Resources()
    """Resources of one engine."""
    learner_resources: Operation[Resources] = Resources()
    """Resources of one learner."""

    @model_validator(mode="after")
    def _kept_tokens_are_bounded(self) -> GrpoConfig:
        cut = "top_p" if self.top_p < 1 else "min_p" if self.min_p > 0 else None
        if cut is not None and not self.top_k:
            raise ValueError(
                f"{cut}: set top_k as well, such as 50; at most so many tokens per sampled token go to the learner, "
                "which needs them for its ratios"
            )
        return self

    @field_validator("temperature")
    @classmethod
    def _engines_sample_at(cls, temperature: float) -> float:
        if temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"{temperature:g} is below {LEAST_TEMPERATURE:g}: vLLM would sample at {LEAST_TEMPERATURE:g}, and the "
                f"learner's ratios would be wrong; set {LEAST_TEMPERATURE:g} or more"
            )
        return temperature

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
            raise ValueError("rewards: every weight is 0, so all completions would get the same reward")
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
                f"balance_prompts: [{low}, {high}] does not contain prompts_per_step ({self.prompts_per_step}); "
                "give the smaller number first"
            )
        if self.balance == "auto" and self.steps is None:
            raise ValueError("balance: set steps too, since the number of steps in one pass is not known in advance")
        return self

    @property
    def balance_bounds(self) -> tuple[int, int]:
        """Smallest and largest number of prompts per step with `balance: auto`."""
        return self.balance_prompts or (self.prompts_per_step, 8 * self.prompts_per_step)

    @model_validator(mode="after")
    def _stale_samples_are_corrected(self) -> GrpoConfig:
        if self.max_staleness > 0 and self.importance_cap is None and self.old_policy == "learner":
            raise ValueError(
                "importance_cap: nothing else corrects the stale samples of max_staleness above 0; set one"
            )
        return self

    @property
    def policies_in_use(self) -> int:
        """Most policies that an engine computes with at once: the newest, and those with which the samples of steps in
        flight began; at least the newest and the one before it."""
        return max(2, self.max_staleness + 1)

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
        shared = (
            max(self.rollout_actors + self.extra_rollout_actors, self.most_learners) > 1
            and 0 < engine < 1
            and 0 < learner < 1
        )
        if shared and not (engine > 0.5 and left / 2 + 1e-9 < learner <= left + 1e-9):
            raise ValueError(
                f"rollout_resources.gpus: {engine:g} and learners' {learner:g} do not share a GPU evenly; to put one "
                "engine and one learner on each GPU give engines more than 0.5 and learners the rest"
            )
        if self.rollout_resources.gpus != "auto":
            self.require_learners_apart()
        return self

    def require_learners_apart(self) -> None:
        """Check that no two learners can be placed on one GPU; an engine on each, or its place, may prevent it.

        Raises:
            ValueError: they can.
        """
        engine, learner = self.rollout_resources.gpu_count, self.learner_resources.gpu_count
        if not (0.5 < engine < 1 and 2 * learner > 1 - engine + 1e-9):
            require_apart("learners", self.most_learners, "learner_resources", learner)

    @model_validator(mode="after")
    def _sequences_are_shared_evenly(self) -> GrpoConfig:
        for number in (self.learners, self.most_learners):
            if number % self.sequence_parallel:
                raise ValueError(
                    f"sequence_parallel: {number} learners cannot be divided into groups of "
                    f"{self.sequence_parallel}; set grpo.learners to a multiple of it, or both numbers of a range"
                )
        return self

    @model_validator(mode="after")
    def _learners_of_a_range_fit(self) -> GrpoConfig:
        require_no_range_by_node("learners", self.max_learners, self.sharding)
        if self.max_learners is not None and 0 < self.learner_resources.gpu_count < 1:
            raise ValueError(
                f"learners: those of a range share no GPU; set learner_resources.gpus to 1, not "
                f"{self.learner_resources.gpu_count:g}, or one number of learners"
            )
        return self

    @property
    def most_learners(self) -> int:
        """Learners if there is room for all."""
        return self.learners if self.max_learners is None else self.max_learners

    @property
    def extra_rollout_actors(self) -> int:
        """Engines that join if there is room."""
        return 0 if self.max_rollout_actors is None else self.max_rollout_actors - self.rollout_actors

    @model_validator(mode="after")
    def _every_shard_has_its_part(self) -> GrpoConfig:
        if self.rollout_shards != "auto" and self.rollout_shards > self.most_shards:
            raise ValueError(
                f"rollout_shards: {self.rollout_shards} processes cannot share {self.most_shards} engines or workers; "
                "each needs one of rollout_actors, reward_workers and, with an environment, environment_workers"
            )
        return self

    @property
    def most_shards(self) -> int:
        """Shards of which each has an engine and workers."""
        workers = [self.reward_workers] if self.environment is None else [self.reward_workers, self.environment_workers]
        return min(self.rollout_actors, *workers)

    @property
    def judged(self) -> bool:
        """Whether teachers grade completions."""
        return any(reward.name == JUDGE for reward in self.rewards)
