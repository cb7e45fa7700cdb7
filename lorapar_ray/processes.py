"""The processes that a stage runs at the same time: what it asks the cluster for, and the same in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorapar_ray.config import Resources, ScoreConfig, SftConfig, TeacherConfig
from lorapar_ray.redact import redacted

Groups = dict[str, tuple[int, Resources]]
"""By name: the number of processes, the fewest of a range, and the resources of each."""


@dataclass(frozen=True)
class Processes:
    """Equal processes of a stage."""

    name: str
    """As in the config (`rollout_actors`), or the teacher's."""
    what: str
    """One of them, in words."""
    count: int
    """Their number; the fewest of a range."""
    resources: Resources
    """What one of them asks for."""
    most: int | None = None
    """The most of a range; None: it is no range."""
    remark: str = ""

    def __str__(self) -> str:
        number = f"{self.count}" if self.most in (None, self.count) else f"{self.count} to {self.most}"
        gpus = self.resources.gpus
        amount = f"{self.resources.cpus:g} CPU"
        if gpus:
            amount += " + GPU auto" if gpus == "auto" else f" + {gpus:g} GPU"
        return f"{number} × {self.what} ({amount}{f', {self.remark}' if self.remark else ''})"


Part = Processes | str
"""Processes, or in words what takes part in the work and asks the cluster for nothing: a remote endpoint."""


def groups_of(parts: Iterable[Part]) -> Groups:
    """What the cluster must have room for; empty: for nothing."""
    return {part.name: (part.count, part.resources) for part in parts if isinstance(part, Processes)}


def in_words(parts: Iterable[Part], rule: str) -> str:
    """The parts as one line, with the rule by which `gpus: auto` becomes a number, if one has it."""
    text = ", ".join(map(str, parts))
    return f"{text}; GPU {rule}" if "GPU auto" in text else text


def training_workers(config: ScoreConfig | SftConfig) -> Processes:
    """The workers of a training group."""
    return Processes("workers", "worker", config.workers, config.resources, config.max_workers)


def teachers(configs: Iterable[TeacherConfig], prefix: str = "") -> Iterator[Part]:
    """Each teacher: the replicas of its engine, or in words how it answers without one.

    Args:
        prefix: of the processes' names.
    """
    for each in configs:
        if each.has_engine:
            ranks = each.engine.tensor_parallel
            parallel = f"tensor parallel {ranks}, " if ranks > 1 else ""
            remark = f"{parallel}{each.ongoing_requests} requests"
            yield Processes(prefix + each.name, each.name, each.replicas, each.resources, each.max_replicas, remark)
        elif each.kind == "remote":
            limit = f", at most {each.requests_per_second:g} requests/s" if each.requests_per_second else ""
            yield f"{each.name} (remote, {each.endpoint} at {redacted(each.base_url)}{limit})"
        elif each.kind == "python":
            yield f"{each.name} ({each.model}, in the asking worker)"
        else:
            yield f"{each.name} (the engine of {each.engine_of})"
