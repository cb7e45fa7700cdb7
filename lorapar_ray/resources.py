"""The resources that a stage requests, in words, for `lorapar run --dry-run`."""

from __future__ import annotations

from lorapar_ray.config import Resources, ScoreConfig, SftConfig, TeacherConfig
from lorapar_ray.gpus import RULES
from lorapar_ray.redact import redacted


def asked(stage: str, *parts: str) -> str:
    """The parts as one line, with the rule by which `gpus: auto` becomes a number."""
    text = ", ".join(part for part in parts if part)
    return f"{text}; GPU {RULES[stage]}" if "GPU auto" in text else text


def each_of(count: int, what: str, resources: Resources, most: int | None = None) -> str:
    """`count` processes of one kind, or as many as there is room for, up to `most`."""
    gpus = " + GPU auto" if resources.gpus == "auto" else f" + {resources.gpus:g} GPU" if resources.gpus else ""
    number = f"{count}" if most is None else f"{count} to {most}"
    return f"{number} × {what} ({resources.cpus:g} CPU{gpus})"


def group_of(config: ScoreConfig | SftConfig) -> str:
    """The training workers of a stage."""
    return each_of(config.workers, "worker", config.resources, config.max_workers)


def teacher(config: TeacherConfig) -> str:
    """The resources of one teacher: replicas with their placement, or a remote endpoint."""
    if config.kind == "remote":
        limit = f", at most {config.requests_per_second:g} requests/s" if config.requests_per_second else ""
        return f"{config.name} (remote, {config.endpoint} at {redacted(config.base_url)}{limit})"
    if config.kind == "python":
        return f"{config.name} ({config.model}, in the asking worker)"
    if config.engine_of is not None:
        return f"{config.name} (the engine of {config.engine_of})"
    ranks, most = config.engine.tensor_parallel, config.max_replicas or config.replicas
    text = each_of(config.replicas, config.name, config.resources)
    if most != config.replicas:
        text = text.replace(f"{config.replicas} ×", f"{config.replicas} to {most} ×", 1)
    parallel = f", tensor parallel {ranks}" if ranks > 1 else ""
    return text[:-1] + f"{parallel}, {config.ongoing_requests} requests)"
