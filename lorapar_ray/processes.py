"""The processes that a stage runs at the same time, for which the cluster must have room."""

from __future__ import annotations

from lorapar_ray.config import Config, Resources, TeacherConfig

Groups = dict[str, tuple[int, Resources]]
"""For each group its number of processes, the fewest of a range, and the resources of each process."""
HINTS = {"label": "label.teachers"}
"""For each stage the setting to lower, if it is not the number of the first group."""


def processes_of(config: Config, stage: str) -> Groups:
    """The groups of a stage; empty: it works only in the driver.

    Args:
        config: with numbers for `gpus: auto`, as `gpus.place` gives it for this stage.
    """
    if stage == "label":
        label = config.label
        return {**_hosted(label.teachers), "workers": (label.workers, label.resources)}
    if stage == "score":
        return {"workers": (config.score.workers, config.score.resources)}
    if stage == "sft":
        return {"workers": (config.sft.workers, config.sft.resources)}
    if stage == "grpo":
        grpo = config.grpo
        environments = {"environment_workers": (grpo.environment_workers, grpo.environment_resources)}
        return {
            "rollout_actors": (grpo.rollout_actors, grpo.rollout_resources),
            "learners": (grpo.learners, grpo.learner_resources),
            "reward_workers": (grpo.reward_workers, grpo.reward_resources),
            **(environments if grpo.environment is not None else {}),
            **_hosted(config.judges, "judge."),
        }
    if stage == "evaluate":
        return {"engines": (config.evaluate.engines, config.evaluate.resources)}
    return {}


def _hosted(teachers: list[TeacherConfig], prefix: str = "") -> Groups:
    return {f"{prefix}{each.name}": (each.replicas, each.resources) for each in teachers if each.has_engine}
