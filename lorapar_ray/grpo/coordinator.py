"""Between rollout engines and learners: which steps are sampled under which policy, and what each learner gets.

One asynchronous task per optimiser step runs `loop.collect`. A step may begin as soon as a policy at most
`max_staleness` versions old is being served: 0 is strictly on-policy, 1 or more overlaps sampling with training and
bounds the queue to that many finished steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import ceil
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.policy import Policy
from lorapar_ray.gpus import sync_of
from lorapar_ray.grpo.batches import share_of
from lorapar_ray.grpo.canaries import MOST_TOLERANCE, Canary, canary_tolerance
from lorapar_ray.grpo.engine_pool import EnginePool, PolicyMismatch
from lorapar_ray.grpo.loop import collect
from lorapar_ray.grpo.prompt_stream import PromptStream
from lorapar_ray.grpo.rewards.actor import RewardWorkers
from lorapar_ray.grpo.rewards.judge import Judge
from lorapar_ray.grpo.rollouts import Rollouts
from lorapar_ray.grpo.samples import Batch
from lorapar_ray.models import resolve_model

FILLINGS = 3
"""Sequences an engine holds, in fillings of its batch. A group ends with its longest sequence, so that most of those
in flight are down to a few; what is held back goes to the engine that is done first."""


def groups_at_once(settings: GrpoConfig) -> int:
    """Groups an engine holds at most."""
    return ceil(FILLINGS * settings.rollout_engine.max_num_seqs / settings.group_size)


class Coordinator:
    """Async Ray actor; owns the rollout engines, the reward workers and the prompt stream."""

    def __init__(self, plan: dict[str, Any], engine: Callable[[], Any] | None = None, place: Any = None) -> None:
        """Take the plan, and what is no plain data beside it.

        Args:
            plan: `settings` (GrpoConfig), `rows` (a sequence of questions, see `TokenTable.question`), `steps`,
                `seed`, `model` (see `models.model_reference`), `trust_remote_code`, `lora_rank`, `judge` (see
                `judging`; None without one) and perhaps `withheld` (environment variables that rewards do not see).
            engine: how to make an engine, if not by the plan.
            place: the engines' placement group.
        """
        from lorapar_ray.datasets.chat import load_encoder

        self._plan = plan
        self._place = place
        self._settings = GrpoConfig.model_validate(plan["settings"])
        self._stream = self._fresh_stream()
        asked = self._settings.canary_tolerance
        self._calibrated = None if asked == "auto" else asked
        self._engines = EnginePool(
            engine or self._new_engine,
            self._settings.rollout_actors,
            at_once=groups_at_once(self._settings),
            tolerance=MOST_TOLERANCE if self._calibrated is None else self._calibrated,
            time_limit_s=self._settings.rollout_time_limit_s,
        )
        judge = None if plan["judge"] is None else Judge(**plan["judge"])
        self._rewards = RewardWorkers(self._settings, judge, plan.get("withheld", ()))
        encoder = load_encoder(resolve_model(plan["model"]), None, plan["trust_remote_code"])
        self._rollouts = Rollouts(self._settings, plan, encoder, self._engines, self._rewards)
        self._steps: dict[int, asyncio.Task[Batch]] = {}
        self._drawn: dict[int, list[int]] = {}
        self._first_step = 0
        self._mismatch: PolicyMismatch | None = None
        self._publishing: asyncio.Task[dict[str, float]] | None = None
        self._marked_at = time.monotonic()
        self._marked_busy_s = 0.0

    async def start(self) -> list[dict[str, Any]]:
        """Start every rollout engine; returns their process ids."""
        return await self._engines.start()

    async def resume(self, step: int, stream: dict[str, Any] | None) -> None:
        """Begin (again) at `step`: forget every unfinished step, and continue the prompts where the checkpoint was."""
        if self._mismatch is not None:
            raise self._mismatch  # a restarted learner would only repeat it
        if self._publishing is not None:  # of the learners before: it must not go on beside these
            self._publishing.cancel()
            await asyncio.wait([self._publishing])
        for task in self._steps.values():
            task.cancel()
        self._steps.clear()
        self._drawn.clear()
        self._first_step = step
        self._stream = self._fresh_stream()
        if stream is not None:
            self._stream.restore(stream)

    async def calibrate(self, canaries: list[Canary], least: float) -> float:
        """Set the canary tolerance from the gap on the bare base, once for the run; returns it.

        A policy cannot loosen its own proof that way: the bare base is measured before any policy is served.

        Args:
            canaries: with the learner's log-probabilities under the bare base.
            least: the least tolerance, in nats.

        Raises:
            UserError: the gap is too large for one model.
        """
        if self._calibrated is None:
            self._calibrated = canary_tolerance(await self._engines.base_gap(canaries), least)
            self._engines.tolerance = self._calibrated
        return self._calibrated

    async def publish(self, policy: Policy, canaries: list[Canary]) -> dict[str, float]:
        """Serve `policy` on every engine and check that they do; sampling that waited for it begins.

        Returns:
            seconds and bytes of the sync, the largest canary gap (mean absolute log-probability difference in nats),
            the engines' idle share since the last sync, engines replaced so far, and finished steps in the queue.

        Raises:
            PolicyMismatch: see `EnginePool.publish`.
        """
        self._publishing = asyncio.create_task(self._publish(policy, canaries))
        try:
            return await self._publishing
        except asyncio.CancelledError:
            raise RuntimeError(f"policy {policy.version} was given up: the learners have begun again") from None

    async def _publish(self, policy: Policy, canaries: list[Canary]) -> dict[str, float]:
        if self._settings.drain:
            await asyncio.gather(*self._steps.values(), return_exceptions=True)
        start = time.monotonic()
        idle = 1.0 - self._engines.busy_share(self._marked_at, self._marked_busy_s)
        self._marked_at, self._marked_busy_s = start, self._engines.busy_seconds()
        try:
            gap = await self._engines.publish(policy, canaries)
        except PolicyMismatch as mismatch:
            self._mismatch = mismatch
            raise
        for step in range(max(self._first_step, policy.version), policy.version + self._settings.max_staleness + 1):
            if step not in self._steps and step < self._plan["steps"]:
                drawn = self._drawn[step] = []
                self._steps[step] = asyncio.create_task(
                    collect(step, drawn, self._stream, self._rollouts, self._settings)
                )
        return {
            "seconds/sync": time.monotonic() - start,
            "sync_bytes": float(len(policy.tensors)),
            "canary_gap": gap,
            "canary_tolerance": self._engines.tolerance,
            "idle/engines": idle,
            "engines_replaced": float(self._engines.replaced),
            "queue_depth": float(sum(self._steps[step].done() for step in self._steps if step >= policy.version)),
        }

    async def batch(self, step: int, rank: int, world: int) -> Batch:
        """This rank's share of a step's samples: whole groups, dealt out by length so that ranks carry equal weight."""
        whole = await self._steps[step]
        for finished in [at for at in self._steps if at < step]:
            del self._steps[finished], self._drawn[finished]
        return share_of(whole, rank, world, self._settings.mini_batch)

    async def checkpoint(self, step: int) -> dict[str, Any]:
        """State of the prompt stream as it is after training on `step`."""
        return self._stream.state([index for at, drawn in sorted(self._drawn.items()) if at > step for index in drawn])

    async def stop(self) -> None:
        """End reward workers and engines."""
        self._rewards.stop()
        await self._engines.stop()

    def _fresh_stream(self) -> PromptStream:
        return PromptStream(
            len(self._plan["rows"]), self._plan["seed"], by_solve_rate=self._settings.curriculum == "solve_rate"
        )

    def _new_engine(self) -> Any:
        settings = self._settings
        return start_engine(
            self._plan["model"],
            settings.rollout_engine,
            settings.rollout_resources,
            seed=self._plan["seed"],
            where="grpo.rollout_engine",
            trust_remote_code=self._plan["trust_remote_code"],
            sync=sync_of(settings),
            max_lora_rank=self._plan["lora_rank"],
            place=self._place,
        )
