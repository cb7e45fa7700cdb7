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

    job = GrpoJob(**payload)
    _learn([job], [ray.get_actor(job.coordinator)])


def learn_arms_worker(payload: dict[str, Any]) -> None:
    """The same for the jobs of `payload["jobs"]`, which share a base and a coordinator."""
    import ray

    from lorapar_ray.engines.arm_handle import ArmHandle

    jobs = [GrpoJob(**each) for each in payload["jobs"]]
    actor = ray.get_actor(jobs[0].coordinator)
    _learn(jobs, [ArmHandle(actor, number) for number in range(len(jobs))])


def _learn(jobs: list[GrpoJob], coordinators: list[Any]) -> None:
    import ray.train

    from lorapar_ray.grpo.journal import Journal
    from lorapar_ray.grpo.learner import Learner
    from lorapar_ray.grpo.loop import learn

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    learner, journals = Learner(jobs), []
    if rank == 0:
        journals = [
            Journal(Path(job.metrics), Path(job.samples), arm.settings.report_to, job.run, learner.text)
            for job, arm in zip(jobs, learner.arms, strict=True)
        ]
    learn(learner, coordinators, journals, rank, world)
