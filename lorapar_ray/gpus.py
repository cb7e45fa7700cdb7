"""Resolves `gpus: auto` for a given number of GPUs: pure functions from a config to one with numbers.

The rule, a stage at a time, since stages run one after the other:

- No GPU: every process computes on the CPU.
- Training workers (`score`, `sft`) and engines of `evaluate`: a GPU for each, one for each rank of a tensor-parallel
  engine. There are at most as many as fit: two workers on one GPU only take turns, and NCCL refuses them.
- Hosted teachers: a GPU for each replica (for each rank); with too few GPUs they share them evenly.
- Stage 2: engines, learners and judges get their own GPUs if there are enough. Else an engine and a learner share
  each GPU, at most one of each on it, and judges take a part that fits beside them even if Ray puts all judges on one
  GPU. Then the number of learners is fixed: a learner with a part of a GPU must not come to one that has a learner.
- Asking and reward workers: none; they compute nothing on one unless a user's own code does, who then gives a number.

A number in the config is kept, and its GPUs are subtracted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from typing import Any, TypeVar

from lorapar_ray.config import Config, EvaluateConfig, GrpoConfig, Resources, Section, TeacherConfig
from lorapar_ray.errors import UserError

ENGINE_SHARE = 0.6
"""An engine's share of a GPU that a learner shares; the learner gets the rest."""
MORE_THAN_HALF = 0.51
"""The smallest such share with several GPUs: two engines then never fit on one."""
JUDGES_SHARE = 0.2
"""All judges' shares together, where engines and learners use every GPU: Ray may put them on one. With much more, two
learners would fit on a GPU without a judge."""
RULES = {
    "label": "auto: one for each teacher, or shared evenly",
    "score": "auto: one each, at most as many workers as GPUs",
    "sft": "auto: one each, at most as many workers as GPUs",
    "grpo": f"auto: one each; if too few, an engine ({ENGINE_SHARE:g}) and a learner share one",
    "evaluate": "auto: one for each rank, at most as many engines as fit",
}
"""The rule in a few words, for `--dry-run`."""

Part = TypeVar("Part", bound=Section)


def place(config: Config, stage: str, gpus: int) -> Config:
    """The config for running `stage` on a cluster with `gpus` GPUs: every `gpus: auto` of that stage is a number."""
    if stage == "label":
        label = config.label
        taken = label.workers * label.resources.gpu_count
        teachers = _teachers(label.teachers, gpus - taken)
        return _with(config, label=_with(label, teachers=teachers, resources=without_auto(label.resources)))
    if stage == "score":
        workers, resources = _workers(config.score.workers, config.score.resources, gpus)
        return _with(config, score=_with(config.score, workers=workers, resources=resources))
    if stage == "sft":
        workers, resources = _workers(config.sft.workers, config.sft.resources, gpus)
        return _with(config, sft=_with(config.sft, workers=workers, resources=resources))
    if stage == "grpo":
        return _stage2(config, gpus)
    if stage == "evaluate":
        return _with(config, evaluate=placed_engines(config.evaluate, gpus))
    return config


def placed_engines(settings: EvaluateConfig, gpus: int) -> EvaluateConfig:
    """The engines of `evaluate` on a cluster with `gpus` GPUs."""
    ranks = settings.engine.tensor_parallel
    fits = max(1, gpus // ranks) if gpus and settings.resources.gpus == "auto" else settings.engines
    engines = min(settings.engines, fits)
    return _with(settings, engines=engines, resources=engine_resources(settings.resources, ranks, gpus))


def engine_resources(resources: Resources, ranks: int, gpus: int) -> Resources:
    """The resources of an engine of `evaluate` on a cluster with `gpus` GPUs."""
    return _given(resources, ranks if gpus else 0)


def _workers(workers: int, resources: Resources, gpus: int) -> tuple[int, Resources]:
    """A training group: a GPU each."""
    if resources.gpus != "auto" or not gpus:
        return workers, _given(resources, 0)
    return min(workers, gpus), _given(resources, 1)


def _teachers(teachers: Sequence[TeacherConfig], gpus: float) -> list[TeacherConfig]:
    """Hosted teachers on `gpus` GPUs; other teachers request none."""
    hosted = [teacher for teacher in teachers if teacher.has_engine]
    free = gpus - sum(_most(each) * each.resources.gpu_count for each in hosted)
    asking = [each for each in hosted if each.resources.gpus == "auto"]
    wide = [each for each in asking if each.engine.tensor_parallel > 1]
    free -= sum(_most(each) * each.engine.tensor_parallel for each in wide)
    share = _share(sum(_most(each) for each in asking if each not in wide), free) if gpus > 0 else 0.0

    def placed(teacher: TeacherConfig) -> TeacherConfig:
        ranks = teacher.engine.tensor_parallel
        wanted = 0.0 if gpus <= 0 or not teacher.has_engine else ranks if ranks > 1 else share
        return _with(teacher, resources=_given(teacher.resources, wanted))

    return [placed(teacher) for teacher in teachers]


def _most(teacher: TeacherConfig) -> int:
    """Most replicas of a teacher."""
    return teacher.max_replicas or teacher.replicas


def _share(processes: int, free: float) -> float:
    """Each process's share of `free` GPUs: a whole GPU, or a part such that all processes fit."""
    if processes <= max(free, 0.0):
        return 1.0
    whole = floor(free)
    part = 1.0 / ceil(processes / whole) if whole else max(free, 0.0) / processes
    return max(0.01, floor(part * 100) / 100)


def _stage2(config: Config, gpus: int) -> Config:
    """Engines, learners and judges."""
    settings, judges = config.grpo, [each for each in config.judges if each.kind == "serve"]
    engine, learner = settings.rollout_resources, settings.learner_resources
    ranks = settings.rollout_engine.tensor_parallel
    apart = gpus - settings.rollout_actors * _number(engine, ranks) - settings.learners * _number(learner, 1)
    paired = engine.gpus == "auto" and ranks == 1 and settings.learners > 1 and 0 < learner.gpu_count < 1
    judging = sum(_most(each) * _number(each.resources, each.engine.tensor_parallel) for each in judges)
    if not gpus:
        graded, shares = _teachers(judges, 0), (0.0, 0.0)
    elif not paired and apart >= judging:
        graded, shares = _teachers(judges, apart), (float(ranks), 1.0)
    else:
        graded = _beside(judges)
        left, others = 1.0 - _part_of_one(graded), max(1, gpus - _alone(graded))
        shares = _on_one_gpu(engine, learner, ranks, left, several=others > 1)
        settings = _with(
            settings,
            rollout_actors=settings.rollout_actors if engine.gpus != "auto" else min(settings.rollout_actors, others),
            learners=settings.learners if learner.gpus != "auto" else _learners(settings, others),
            max_learners=None if 0 < _given(learner, shares[1]).gpu_count < 1 else settings.max_learners,
        )
    settings = _with(
        settings,
        rollout_resources=_given(engine, shares[0]),
        learner_resources=_given(learner, shares[1]),
        reward_resources=without_auto(settings.reward_resources),
    )
    if gpus:
        _require_learners_apart(settings, _part_of_one(graded))
    placed = {each.name: each for each in config.label.teachers} | {each.name: each for each in graded}
    label = _with(config.label, teachers=list(placed.values()))
    return _with(config, grpo=settings, label=label)


def _require_learners_apart(settings: GrpoConfig, judges: float) -> None:
    """`GrpoConfig.require_learners_apart`, of numbers that the config alone does not have.

    Args:
        judges: what they take of one GPU at most.

    Raises:
        UserError: two learners may meet on one GPU.
    """
    try:
        settings.require_learners_apart()
    except ValueError as error:
        beside = f" (an engine has {settings.rollout_resources.gpu_count:g}, judges up to {judges:g} of a GPU)"
        raise UserError(f"grpo.{error}{beside}") from error


def _learners(settings: GrpoConfig, gpus: int) -> int:
    """Learners on `gpus` GPUs, in whole groups; a group that is larger is left to the check of the cluster."""
    group = settings.sequence_parallel
    return max(group, min(settings.learners, gpus) // group * group)


def _number(resources: Resources, auto: int) -> float:
    """GPUs a process would take if there were enough."""
    return auto if resources.gpus == "auto" else resources.gpu_count


def _on_one_gpu(
    engine: Resources, learner: Resources, ranks: int, left: float, *, several: bool
) -> tuple[float, float]:
    """Shares of a GPU, of which `left` is free, for an engine and a learner; the config may have fixed either."""
    if ranks > 1:
        return float(ranks), 1.0  # Ray cannot give a process parts of several GPUs
    share = max(ENGINE_SHARE * left, MORE_THAN_HALF if several else 0.0)
    if engine.gpus != "auto":
        share = engine.gpu_count
    elif learner.gpus != "auto":
        share = left - learner.gpu_count
    rest = left - share
    return (floor(100 * share) / 100 if share > 0 else 1.0), (floor(100 * rest + 1e-6) / 100 if rest > 0 else 1.0)


def _beside(judges: Sequence[TeacherConfig]) -> list[TeacherConfig]:
    """Judges on GPUs that engines and learners use: they fit on one together. One over several GPUs takes those."""
    wide = [each.engine.tensor_parallel > 1 for each in judges]
    count = sum(_most(each) for each, is_wide in zip(judges, wide, strict=True) if not is_wide)
    share = max(0.01, floor(100 * JUDGES_SHARE / max(1, count)) / 100)
    return [
        _with(each, resources=_given(each.resources, each.engine.tensor_parallel if is_wide else share))
        for each, is_wide in zip(judges, wide, strict=True)
    ]


def _part_of_one(judges: Sequence[TeacherConfig]) -> float:
    """The most of one GPU that (placed) judges with a part of a GPU take."""
    return min(1.0, sum(_most(each) * each.resources.gpu_count for each in judges if each.resources.gpu_count < 1))


def _alone(judges: Sequence[TeacherConfig]) -> int:
    """GPUs that (placed) judges do not share."""
    return round(sum(_most(each) * each.resources.gpu_count for each in judges if each.resources.gpu_count >= 1))


def sync_of(settings: GrpoConfig) -> str:
    """How policies are served: by the config, else by the (placed) engines' device."""
    if settings.sync != "auto":
        return settings.sync
    return "adapter" if settings.rollout_resources.gpu_count else "merged"


def without_auto(resources: Resources) -> Resources:
    """`auto` of a process that computes nothing on a GPU: none."""
    return _given(resources, 0)


def _given(resources: Resources, gpus: float) -> Resources:
    return _with(resources, gpus=float(gpus)) if resources.gpus == "auto" else resources


def _with(part: Part, **changes: Any) -> Part:
    return part.model_copy(update=changes)
