"""A Ray Train worker of stage 2: builds a learner and runs the loop."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GrpoJob:
    """One GRPO job, JSON-like so that it can be sent to the learners."""

    model: dict[str, Any]
    settings: dict[str, Any]
    base: str
    adapter_in: str
    adapter_out: str
    regions: str | None
    """`regions.safetensors`, or None to train every element."""
    canaries: list[list[Any]]
    """[token ids, start] of each."""
    checkpoints: str
    metrics: str
    samples: str
    steps: int
    coordinator: str
    """Name of the coordinator actor."""
    run: str
    """Name of the run, for trackers."""
    seed: int

    def payload(self) -> dict[str, Any]:
        return asdict(self)


def learn_worker(payload: dict[str, Any]) -> None:
    """Run the loop on this rank (a Ray Train function)."""
    import ray
    import ray.train

    from lorapar_ray.grpo.journal import Journal
    from lorapar_ray.grpo.learner import Learner
    from lorapar_ray.grpo.loop import learn

    job = GrpoJob(**payload)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    learner, journal = Learner(job), None
    if rank == 0:
        journal = Journal(Path(job.metrics), Path(job.samples), learner.settings.report_to, job.run, learner.text)
    learn(learner, ray.get_actor(job.coordinator), journal, rank, world)
