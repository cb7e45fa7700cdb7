"""What each stage asks of the cluster, in words, for `lorapar run --dry-run`."""

from __future__ import annotations

from lorapar_ray.config import Config, Resources, TeacherConfig
from lorapar_ray.gpus import RULES, without_auto


def resources_of(config: Config) -> dict[str, str]:
    """One line per stage that asks Ray for something."""
    grpo, evaluate = config.grpo, config.evaluate
    asked = {
        "label": _join(
            *(_teacher(teacher) for teacher in config.label.teachers),
            _each(config.label.workers, "asking worker", without_auto(config.label.resources))
            + f", {config.label.workers * config.label.concurrency} questions in flight"
            if config.label.teachers
            else "",
        ),
        "score": _each(config.score.workers, "worker", config.score.resources),
        "sft": _each(config.sft.workers, "worker", config.sft.resources),
        "grpo": _join(
            _each(grpo.rollout_actors, "rollout engine", grpo.rollout_resources),
            _each(grpo.learners, "learner", grpo.learner_resources),
            _each(grpo.reward_workers, "reward worker", without_auto(grpo.reward_resources)),
            *(_teacher(judge) for judge in config.judges),
        ),
        "evaluate": _each(1, "engine", evaluate.resources),
    }
    ruled = {stage: f"{text}; GPU {RULES[stage]}" if "GPU auto" in text else text for stage, text in asked.items()}
    return {stage: ruled.get(stage) or "this process only" for stage in (*asked, "partition", "report")}


def _teacher(teacher: TeacherConfig) -> str:
    """What one teacher asks for: replicas with their placement, or somebody else's machine."""
    if teacher.kind == "remote":
        limit = f", at most {teacher.requests_per_second:g} requests/s" if teacher.requests_per_second else ""
        return f"{teacher.name} (remote, {teacher.endpoint} at {teacher.base_url}{limit})"
    if teacher.kind == "python":
        return f"{teacher.name} ({teacher.model}, in the asking worker)"
    ranks, most = teacher.engine.tensor_parallel, teacher.max_replicas or teacher.replicas
    text = _each(teacher.replicas, teacher.name, teacher.resources)
    if most != teacher.replicas:
        text = text.replace(f"{teacher.replicas} ×", f"{teacher.replicas} to {most} ×", 1)
    return text[:-1] + (f", tensor parallel {ranks}" if ranks > 1 else "") + f", {teacher.ongoing_requests} requests)"


def _each(count: int, what: str, resources: Resources) -> str:
    gpus = " + GPU auto" if resources.gpus == "auto" else f" + {resources.gpus:g} GPU" if resources.gpus else ""
    return f"{count} × {what} ({resources.cpus:g} CPU{gpus})"


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
