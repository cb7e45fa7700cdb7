"""Stage `grpo`, stage 2 of the method: the System 2 region by GRPO on System 2 prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.config.marks import deciding
from lorapar_ray.gpus import without_auto
from lorapar_ray.processes import Part, Processes, teachers
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Settings, Stage, before, model_files, order_until, settings_of
from lorapar_ray.user_modules import user_modules


def run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Train."""
    from lorapar_ray.grpo.job import train_stage2

    return train_stage2(config, run)


def settings(config: Config) -> Settings:
    """Its own settings, and the teachers that grade completions."""
    found = settings_of(config, "model", "grpo") | order_until(config, "grpo")
    if not config.grpo.judged:
        return {path: setting for path, setting in found.items() if not path.startswith("grpo.judge.")}
    for index, judge in enumerate(config.label.teachers):
        if judge in config.judges:
            found |= deciding(judge, f"label.teachers.{index}")
    return found


def reads(config: Config) -> Iterator[str]:
    """The student, hosted judges, and the user's modules: rewards, the environment and judges in Python."""
    for path in (config.model.path, *(judge.model for judge in config.judges if judge.kind == "serve")):
        yield from model_files(path)
    own = (judge.model for judge in config.judges if judge.kind == "python")
    yield from user_modules(*(reward.name for reward in config.grpo.rewards), config.grpo.environment, *own)


def processes(config: Config) -> Iterator[Part]:
    """Engines, learners, reward workers and judges."""
    grpo = config.grpo
    engines = ("rollout_actors", "rollout engine", grpo.rollout_actors, grpo.rollout_resources)
    yield Processes(*engines, grpo.max_rollout_actors)
    yield Processes("learners", "learner", grpo.learners, grpo.learner_resources, grpo.max_learners)
    yield Processes("reward_workers", "reward worker", grpo.reward_workers, without_auto(grpo.reward_resources))
    if grpo.environment is not None:
        environments = ("environment_workers", "environment worker", grpo.environment_workers)
        yield Processes(*environments, without_auto(grpo.environment_resources))
    yield from teachers(config.judges, "judge.")


def check(config: Config) -> None:
    """Check that rewards, the environment and trackers can be imported, and that the dtype has room for gradients."""
    from lorapar_ray.grpo.environments.registry import require_environment
    from lorapar_ray.grpo.rewards.registry import require_rewards
    from lorapar_ray.precision import require_trainable
    from lorapar_ray.tracking import require_trackers

    require_trainable(config.model.dtype)
    require_rewards(config.grpo)
    require_environment(config.grpo)
    require_trackers(config.grpo.report_to, "grpo.report_to")


def check_there(config: Config) -> None:
    """Check that trackers have their keys, and that learners can share the student's sequences, if they are to."""
    from lorapar_ray.models import model_reference
    from lorapar_ray.tracker_check import require_keys
    from lorapar_ray.workers import on_a_worker

    require_keys(config, "grpo")
    if config.grpo.sequence_parallel > 1:
        model = config.model
        on_a_worker(
            require_shared_sequences,
            model_reference(model.path),
            model.trust_remote_code,
            config.grpo.sequence_parallel,
        )


def require_shared_sequences(model: str, trust_remote_code: bool, ranks: int) -> None:
    """Check that `ranks` learners can share the sequences of a student that this machine has.

    Raises:
        UserError: they cannot, or the student's config cannot be read.
    """
    from lorapar_ray.models import architecture, resolve_model
    from lorapar_ray.sequence_parallel import require_shareable

    require_shareable(architecture(resolve_model(model), trust_remote_code), ranks)


STAGE = Stage(
    name="grpo",
    help="Stage 2: masked GRPO on System 2 rows.",
    needs=lambda config: before(config, "grpo"),
    settings=settings,
    run=run,
    outputs=("grpo",),
    traces=(
        *("rejects/grpo.parquet", "metrics/grpo.jsonl", "metrics/samples.jsonl", "metrics/tensorboard/grpo"),
        *("metrics/grpo.trackers.json", "metrics/grpo.notices.txt"),
    ),
    scratch=("work/grpo",),
    reads=reads,
    processes=processes,
    check=check,
    check_there=check_there,
)
