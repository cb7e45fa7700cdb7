"""Stage 2's loop, top down: sample → reward → advantage → step → publish.

    coordinator  `collect`: sample ─► reward ─► advantage ──── a batch, of which each learner gets its share ────┐
         ▲                                                                                                       ▼
         └── every engine loads the policy and verifies it ◄─────────── publish ◄─ step: `learn`, on each learner

`collect` runs once for each optimiser step, in the coordinator, which decides when a step may begin (`coordinator.py`).
`learn` runs on each learner from the first step to the last. They call `sampler.py` (engines and reward workers),
`batches.py` and `dealing.py` (advantages and shares), `learner.py` and `update.py` (loss, optimiser), and
`served_policy.py` (publishing).
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
from lorapar_ray.leaving import loses_a_node

if TYPE_CHECKING:
    from lorapar_ray.collectives import HostWait
    from lorapar_ray.engines.canaries import Canary
    from lorapar_ray.grpo.arm import Arm
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


def learn(learner: Learner, coordinators: Sequence[Any], journals: Sequence[Journal], rank: int, world: int) -> None:
    """Train every arm from its newest checkpoint to its last step, in step with the other learners.

    A policy is published while the next batch is fetched and computed, and verified before the next optimiser step; by
    then every policy that sampled its tokens is verified. So with `max_staleness` above 0 no process waits for it.

    Runs that train together are arms of one learner: each step is then a step of every unfinished arm.

    Args:
        coordinators: by arm, a handle of what runs its `collect`.
        journals: by arm, of the learner that leads (rank 0): it publishes policies, writes metrics and checkpoints;
            empty on other ranks.
    """
    from lorapar_ray.collectives import HostWait

    arms, host = learner.arms, HostWait(world)
    restored = [arm.restore(rank, world) for arm in arms]
    steps = [step for step, _ in restored]
    leads = [Lead(*each) for each in zip(arms, coordinators, journals, strict=True)] if journals else []
    computes_canaries = bool(leads) or learner.forward.together
    if computes_canaries:
        begin_arms(learner, leads, restored)
    host.together()  # no rank asks for a batch before rank 0 has told the coordinators where to begin
    while running := {number: steps[number] for number, arm in enumerate(arms) if steps[number] < arm.steps}:
        take_step(learner, coordinators, leads, running, rank, world, host, computes_canaries=computes_canaries)
        for number in running:
            steps[number] += 1
    for number, lead in enumerate(leads):
        lead.publisher.wait()
        learner.finish(number)


def take_step(
    learner: Learner,
    coordinators: Sequence[Any],
    leads: Sequence[Lead],
    running: Mapping[int, int],
    rank: int,
    world: int,
    host: HostWait,
    *,
    computes_canaries: bool,
) -> None:
    """One optimiser step of every unfinished arm: fetch this learner's shares, update, publish, record.

    Args:
        coordinators: as for `learn`.
        leads: by arm, on rank 0; empty on other ranks.
        running: by number of an unfinished arm, the steps that it has taken.
        host: where the other ranks wait until rank 0's policy is verified; else they would in the next collective.
        computes_canaries: this rank computes along for the canary tokens of the new policies.
    """

    def verified(number: int) -> None:
        if leads:
            leads[number].publisher.wait()
        host.together()

    start = time.monotonic()
    fetched = {
        number: fetch(
            coordinators[number],
            step,
            rank,
            world,
            together=learner.arms[number].settings.sequence_parallel,
            packed=learner.forward.packed,
        )
        for number, step in running.items()
    }
    waited = time.monotonic() - start
    clock = Clock()
    with clock.phase("learn"):
        metrics = learner.step(
            {number: mini_batches for number, (_, mini_batches) in fetched.items()},
            dict(running),
            world,
            before_update=verified,
        )
        canaries = learner.canaries() if computes_canaries else []
    own = [(number, leads[number]) for number in running if leads]
    proofs = sum(lead.publisher.figures["seconds/wait_for_proof"] for _, lead in own)
    for number, lead in own:
        lead.publish(running[number] + 1, canaries[number])
        lead.journal.write(
            running[number] + 1,
            fetched[number][0],
            {**metrics[number], **lead.publisher.figures, "learners": float(world)},
            learning=clock.seconds["learn"] - proofs,
            waited=waited,
            proofs=proofs,
            whole=time.monotonic() - start,
        )
    for number in running:
        learner.arms[number].require_finite()
    for number, lead in own:
        lead.checkpoint_if_due(running[number] + 1)


def begin_arms(learner: Learner, leads: Sequence[Lead], restored: Sequence[tuple[int, dict[str, Any] | None]]) -> None:
    """Bring every arm's coordinator to where training resumes, and publish its first policy.

    Args:
        leads: empty on a rank that only computes along.
        restored: each arm's steps done and prompt stream, from its checkpoint.
    """
    canaries = learner.canaries()
    measured = any(arm.settings.canary_tolerance == "auto" for arm in learner.arms)
    base_canaries = learner.base_canaries() if measured else canaries
    if not leads:
        return
    for lead, (step, stream) in zip(leads, restored, strict=True):
        lead.begin(step, stream)
    for lead, of_base in zip(leads, base_canaries, strict=True):
        lead.calibrate(of_base, learner.rounding)  # before any policy is served
    for lead, (step, _), own in zip(leads, restored, canaries, strict=True):
        lead.publish(step, own)


class Lead:
    """What rank 0 does for one arm."""

    def __init__(self, arm: Arm, coordinator: Any, journal: Journal) -> None:
        self.arm, self.coordinator, self.journal = arm, coordinator, journal
        self.publisher = Publisher(coordinator, arm.settings.policy_transport)

    def begin(self, step: int, stream: dict[str, Any] | None) -> None:
        """Tell the coordinator and the journal where training resumes."""
        resumed = self.coordinator.resume.options(max_task_retries=-1).remote(step, stream)  # it may also be restarting
        answer_from(self.coordinator, resumed)
        self.journal.begin(step)

    def calibrate(self, canaries: Sequence[Canary], rounding: float) -> None:
        """Measure the canary tolerance, if the config asks for it."""
        if self.arm.settings.canary_tolerance == "auto":
            answer_from(self.coordinator, self.coordinator.calibrate.remote(list(canaries), rounding))

    def publish(self, step: int, canaries: Sequence[Canary]) -> None:
        """Begin to publish the current policy."""
        self.publisher.publish(self.arm.policy(step), canaries)

    def checkpoint_if_due(self, step: int) -> None:
        """Write a checkpoint if one follows this step, or if a node will be lost; a finished arm needs none."""
        if (step % self.arm.settings.checkpoint_every == 0 or loses_a_node()) and step < self.arm.steps:
            self.arm.save(step, answer_from(self.coordinator, self.coordinator.checkpoint.remote(step - 1)))
