"""What each stage asks of the cluster, in words, for `lorapar run --dry-run`."""

from __future__ import annotations

from lorapar_ray.config import Config, Resources


def resources_of(config: Config) -> dict[str, str]:
    """One line per stage that asks Ray for something."""
    grpo, evaluate = config.grpo, config.evaluate
    asked = {
        "label": _join(
            *(_each(t.replicas, f"{t.name}", t.resources) for t in config.label.teachers if t.kind == "serve"),
            *(f"{t.name} (remote)" for t in config.label.teachers if t.kind == "remote"),
            _each(config.label.workers, "asking worker", config.label.resources) if config.label.teachers else "",
        ),
        "score": _each(config.score.workers, "worker", config.score.resources),
        "sft": _each(config.sft.workers, "worker", config.sft.resources),
        "grpo": _join(
            _each(grpo.rollout_actors, "rollout engine", grpo.rollout_resources),
            _each(grpo.learners, "learner", grpo.learner_resources),
        ),
        "evaluate": _each(1, "engine", evaluate.resources),
    }
    return {stage: asked.get(stage) or "this process only" for stage in (*asked, "partition", "report")}


def _each(count: int, what: str, resources: Resources) -> str:
    gpus = f" + {resources.gpus:g} GPU" if resources.gpus else ""
    return f"{count} × {what} ({resources.cpus:g} CPU{gpus})"


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
