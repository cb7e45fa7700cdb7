"""Stage 2's loop, top down: sample → reward → advantage → step → publish.

    coordinator  `collect`: sample ─► reward ─► advantage ──── a batch, of which each learner gets its share ────┐
         ▲                                                                                                       ▼
         └── every engine loads the policy and verifies it ◄─────────── publish ◄─ step: `learn`, on each learner

`collect` runs once for each optimiser step, in the coordinator, which decides when a step may begin (`coordinator.py`).
`learn` runs on each learner from the first step to the last. They call `sampler.py` (engines and reward workers),
`batches.py` and `dealing.py` (advantages and shares), `learner.py` and `update.py` (loss, optimiser), and
`engine_pool.py` (publishing).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorapar_ray.grpo.asking import answer_from
from lorapar_ray.grpo.batches import Batch, make_batch
from lorapar_ray.grpo.clock import Clock
from lorapar_ray.grpo.failures import Failures
from lorapar_ray.grpo.fetching import fetch
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.prompt_stream import PromptStream
from lorapar_ray.grpo.publishing import Publisher

if TYPE_CHECKING:
    from lorapar_ray.grpo.journal import Journal
    from lorapar_ray.grpo.learner import Learner
    from lorapar_ray.grpo.sampler import Sampler
    from lorapar_ray.grpo.shards import Shards


async def collect(
    step: int,
    size: int,
    refills: int,
    *,
    drawn: list[int],
    stream: PromptStream,
    sampler: Sampler | Shards,
    failures: Failures,
    rows: Sequence[Mapping[str, Any]],
) -> Batch:
    """One step's batch. Groups whose rewards are all equal give no gradient and are replaced by others.

    Args:
        step: the version that will train on it.
        size: prompts.
        refills: how often groups are replaced.
        drawn: gets the prompts as they are drawn; a checkpoint meanwhile hands them back to the stream.
        rows: the run's questions.
    """
    clock = Clock()
    groups: list[Group] = []
    dropped: list[Group] = []
    for attempt in range(refills + 1):
        indices = stream.take(size - len(groups))
        drawn += indices
        with clock.phase("rollout"):
            found = await sampler.groups(indices, step, attempt)
        for index, group in zip(indices, found, strict=True):
            if group.rewards:
                stream.observe(index, group.solved)
            (groups if group.spread > 0 else dropped).append(group)
        if len(groups) == size:
            break
    failures.report([*groups, *dropped], step)
    return make_batch(groups, dropped, drawn, step, clock.seconds, rows)


def learn(learner: Learner, coordinator: Any, journal: Journal | None, rank: int, world: int) -> None:
    """Train from the newest checkpoint to the last step, in step with the other learners.

    A policy is published while the next batch is fetched and computed, and verified before the next optimiser step; by
    then every policy that sampled its tokens is verified. So with `max_staleness` above 0 no process waits for it.

    Args:
        coordinator: handle of the actor that runs `collect`.
        journal: of the learner that leads (rank 0): it publishes the policy, writes metrics and checkpoints.
    """
    import torch.distributed as dist

    steps, settings = learner.job.steps, learner.settings
    computes_canaries = journal is not None or learner.forward.together
    step, stream = learner.restore(rank, world)
    canaries = learner.canaries() if computes_canaries else []
    measured = settings.canary_tolerance == "auto"
    base_canaries = learner.base_canaries() if measured and computes_canaries else []
    publisher = None
    if journal is not None:
        resumed = coordinator.resume.options(max_task_retries=-1).remote(step, stream)  # it may also be restarting
        answer_from(coordinator, resumed)
        journal.begin(step)
        if measured:
            answer_from(coordinator, coordinator.calibrate.remote(base_canaries, learner.rounding))
        publisher = Publisher(coordinator)
        publisher.publish(learner.policy(step), canaries)
    if world > 1:
        dist.barrier()  # no rank asks for a batch before rank 0 has told the coordinator where to begin
    while step < steps:
        start = time.monotonic()
        share, mini_batches = fetch(coordinator, step, rank, world, settings.sequence_parallel)
        waited = time.monotonic() - start
        clock = Clock()
        with clock.phase("learn"):
            metrics = learner.step(mini_batches, step, world, before_update=publisher.wait if publisher else None)
            canaries = learner.canaries() if computes_canaries else []
        step += 1
        if publisher is not None and journal is not None:
            metrics |= publisher.figures
            learning = clock.seconds["learn"] - metrics["seconds/wait_for_proof"]
            publisher.publish(learner.policy(step), canaries)
            journal.write(step, share, metrics, learning, waited, time.monotonic() - start)
            if step % settings.checkpoint_every == 0 and step < steps:
                learner.save(step, answer_from(coordinator, coordinator.checkpoint.remote(step - 1)))
    if publisher is not None:
        publisher.wait()
        learner.finish()
