"""Connects rollout engines and learners: decides which policy samples each step, and each learner's share.

One asynchronous task per optimiser step runs `loop.collect`. A step may begin once the served policy is at most
`max_staleness` versions old: 0 is strictly on-policy; 1 or more overlaps sampling with training, and the queue holds at
most that many finished steps.

Tokens and weights do not pass through this process. It holds a group's reference, lengths and rewards, and a policy's
digest and reference; tokens, texts and weights go directly from producer to reader through Ray's object store. It owns
the groups' records, so they outlive their engine; a record that is lost with its node is sampled again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import ceil
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.policy import PolicyNote
from lorapar_ray.gpus import sync_of
from lorapar_ray.grpo.balance import Balance
from lorapar_ray.grpo.batches import Batch, Share, shares_of
from lorapar_ray.grpo.canaries import MOST_TOLERANCE, Canary, canary_tolerance
from lorapar_ray.grpo.engine_pool import EnginePool
from lorapar_ray.grpo.environments.actor import EnvironmentWorkers
from lorapar_ray.grpo.loop import collect, sample_group
from lorapar_ray.grpo.policy_proof import PolicyMismatch
from lorapar_ray.grpo.prompt_stream import PromptStream
from lorapar_ray.grpo.rewards.actor import RewardActor, RewardWorkers
from lorapar_ray.grpo.rollouts import Rollouts
from lorapar_ray.models import resolve_model

FILLINGS = 3
"""In-flight cap: sequences per engine, as a multiple of its batch. A group ends with its longest sequence, so most
groups in flight have few running sequences left; queued groups go to the engine that is free first."""


def groups_at_once(settings: GrpoConfig) -> int:
    """In-flight cap: groups per engine."""
    return ceil(FILLINGS * settings.rollout_engine.max_num_seqs / settings.group_size)


class Coordinator:
    """Async Ray actor; owns the rollout engines, the reward workers and the prompt stream.

    They all end with it. If Ray restarts it, the learners and the coordinator resume from the learners' checkpoint.
    """

    def __init__(
        self,
        plan: dict[str, Any],
        engine: Callable[[], Any] | None = None,
        place: Any = None,
        reward_worker: type[Any] = RewardActor,
    ) -> None:
        """Take the plan, and arguments that are not plain data.

        Args:
            plan: `settings` (GrpoConfig), `rows` (a sequence of questions, see `TokenTable.question`), `steps`,
                `seed`, `model` (see `models.model_reference`), `trust_remote_code`, `lora_rank`, `judge` (see
                `judging`; None without one) and perhaps `withheld` (environment variables that rewards do not see).
            engine: a factory of engines; default: from the plan.
            place: the engines' placement group.
            reward_worker: the function of a reward worker.
        """
        from lorapar_ray.datasets.chat import load_encoder

        self._plan = plan
        self._place = place
        self._settings = GrpoConfig.model_validate(plan["settings"])
        self._stream = self._fresh_stream()
        asked = self._settings.canary_tolerance
        self._calibrated = None if asked == "auto" else asked
        self._engines = EnginePool(
            lambda slot: self._new_engine(slot) if engine is None else engine(),
            self._settings.rollout_actors,
            extra=self._settings.extra_rollout_actors,
            at_once=groups_at_once(self._settings),
            tolerance=MOST_TOLERANCE if self._calibrated is None else self._calibrated,
            time_limit_s=self._settings.rollout_time_limit_s,
        )
        self._rewards = RewardWorkers(plan, reward_worker)
        self._environments = EnvironmentWorkers(plan) if self._settings.environment is not None else None
        encoder = load_encoder(resolve_model(plan["model"]), None, plan["trust_remote_code"])
        self._rollouts = Rollouts(
            self._settings, plan, encoder.end_ids, self._engines, self._rewards, self._environments
        )
        self._steps: dict[int, asyncio.Task[Batch]] = {}
        self._drawn: dict[int, list[int]] = {}
        self._shares: dict[int, list[Share]] = {}
        self._changed = asyncio.Event()
        """Set, and replaced, when a step begins or the run fails."""
        self._first_step = 0
        self._failure: Exception | None = None
        """The error that prevents further steps."""
        self._publishing: asyncio.Task[dict[str, float]] | None = None
        self._marked_at = time.monotonic()
        self._marked_busy_s = 0.0
        self._sizes: dict[int, int] = {}
        """Prompts of the steps in progress and done."""
        self._balance = self._fresh_balance()

    async def start(self) -> list[dict[str, Any]]:
        """Start every rollout engine; returns their process ids."""
        return await self._engines.start()

    async def resume(self, step: int, stream: dict[str, Any] | None) -> None:
        """Begin (again) at `step`: discard unfinished steps, and continue the prompt stream from the checkpoint."""
        if isinstance(self._failure, PolicyMismatch):
            raise self._failure  # a restarted learner would only repeat it
        if self._publishing is not None:  # from the previous learners: it must not run at the same time
            self._publishing.cancel()
            await asyncio.wait([self._publishing])
            self._publishing = None
        for task in self._steps.values():
            task.cancel()
        self._failure = None
        self._steps.clear()
        self._drawn.clear()
        self._shares.clear()
        self._sizes.clear()
        self._first_step = step
        self._stream, self._balance = self._fresh_stream(), self._fresh_balance()
        if stream is not None:
            self._stream.restore(stream)
            if self._balance is not None and "balance" in stream:
                self._balance.restore(stream["balance"])
        self._engines.begin_to_start()  # a restarted coordinator has none
        self._engines.grow()  # the learners have what they need

    async def make_room(self) -> None:
        """Before learners begin again, which may need the room of the extra engines."""
        await self._engines.make_room()

    async def calibrate(self, canaries: list[Canary], least: float) -> float:
        """Set the canary tolerance from the gap on the base without an adapter, once for the run; returns it.

        So a policy cannot loosen its own check: the base is measured before any policy is served.

        Args:
            canaries: with the learner's log-probabilities under the base without an adapter.
            least: the least tolerance, in nats.

        Raises:
            UserError: the gap is too large for one model.
        """
        if self._calibrated is None:
            self._calibrated = canary_tolerance(await self._engines.base_gap(canaries), least)
            self._engines.tolerance = self._calibrated
        return self._calibrated

    async def publish(self, policy: PolicyNote, canaries: list[Canary]) -> dict[str, float]:
        """Serve a policy on every engine and verify it; sampling that waited for it begins.

        Returns:
            seconds and bytes of the sync, the largest canary gap (mean absolute log-probability difference in nats),
            the engines' idle share since the last sync, prompts of the steps that begin now, engines that can be
            asked, engines replaced so far, groups lost with their nodes so far, and finished steps in the queue.

        Raises:
            PolicyMismatch: see `EnginePool.publish`.
        """
        task = self._publishing = asyncio.create_task(self._publish(policy, canaries))
        try:
            return await task
        except asyncio.CancelledError:
            raise RuntimeError(f"policy {policy.version} was discarded: the learners have restarted") from None
        except Exception as error:
            if self._publishing is task:  # not from previous learners
                self._failure = error
                self._change()
            raise

    async def _publish(self, policy: PolicyNote, canaries: list[Canary]) -> dict[str, float]:
        if self._settings.drain:
            await asyncio.gather(*self._steps.values(), return_exceptions=True)
        start = time.monotonic()
        idle = 1.0 - self._engines.busy_share(self._marked_at, self._marked_busy_s)
        size = self._sizes.pop(policy.version - 1, None)
        if self._balance is not None and size is not None and policy.version > self._first_step + 1:
            self._balance.observe(size, start - self._marked_at)  # the first step includes start-up time
        wanted = self._settings.prompts_per_step if self._balance is None else self._balance.prompts
        self._marked_at, self._marked_busy_s = start, self._engines.busy_seconds()
        gap = await self._engines.publish(policy, canaries)
        for step in range(max(self._first_step, policy.version), policy.version + self._settings.max_staleness + 1):
            if step not in self._steps and step < self._plan["steps"]:
                drawn = self._drawn[step] = []
                self._sizes[step] = wanted
                self._steps[step] = asyncio.create_task(
                    collect(step, drawn, self._stream, self._rollouts, self._settings, wanted)
                )
        self._change()
        return {
            "seconds/sync": time.monotonic() - start,
            "sync_bytes": float(policy.size),
            "canary_gap": gap,
            "canary_tolerance": self._engines.tolerance,
            "idle/engines": idle,
            "prompts_per_step": float(wanted),
            "engines": float(self._engines.working),
            "engines_replaced": float(self._engines.replaced),
            "groups_lost": float(self._rollouts.lost),
            "queue_depth": float(sum(self._steps[step].done() for step in self._steps if step >= policy.version)),
        }

    async def batch(self, step: int, rank: int, world: int) -> Share:
        """This rank's share of a step's samples, once the step is sampled; see `deal`.

        Raises:
            Exception: the step cannot begin, since its policy could not be published.
        """
        while step not in self._steps:
            if self._failure is not None:
                raise self._failure
            await self._changed.wait()
        whole = await self._steps[step]
        for finished in [at for at in self._steps if at < step]:
            del self._steps[finished], self._drawn[finished]
            self._shares.pop(finished, None)
        if step not in self._shares:
            self._shares[step] = shares_of(whole, world, self._settings)
        return self._shares[step][rank]

    async def lost(self, step: int, groups: list[int]) -> None:
        """Sample these groups of a step again: a learner found that their records were lost with a node."""
        batch = await self._steps[step]
        for number in groups:
            old = batch.groups[number]
            new = await sample_group(self._rollouts, old.index, step, attempt=0)
            if batch.groups[number] is old:  # else another learner, with a part of it, reported it first
                batch.groups[number] = new
                self._rollouts.lost += 1
        self._shares.pop(step, None)

    async def ping(self) -> None:
        """Do nothing; see `asking.answer_from`."""

    async def checkpoint(self, step: int) -> dict[str, Any]:
        """State of the prompt stream after training on `step`."""
        state = self._stream.state([index for at, drawn in sorted(self._drawn.items()) if at > step for index in drawn])
        return state if self._balance is None else {**state, "balance": self._balance.state()}

    async def stop(self) -> None:
        """End reward workers, environments and engines."""
        self._rewards.stop()
        if self._environments is not None:
            self._environments.stop()
        await self._engines.stop()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _fresh_stream(self) -> PromptStream:
        return PromptStream(
            len(self._plan["rows"]), self._plan["seed"], by_solve_rate=self._settings.curriculum == "solve_rate"
        )

    def _fresh_balance(self) -> Balance | None:
        settings = self._settings
        if settings.balance == "off":
            return None
        return Balance(settings.prompts_per_step, settings.balance_bounds)

    def _new_engine(self, slot: int) -> Any:
        settings, engine = self._settings, self._settings.rollout_engine
        if settings.top_k:  # the largest number of log-probabilities per request
            engine = engine.model_copy(update={"extra": {"max_logprobs": settings.top_k, **engine.extra}})
        return start_engine(
            self._plan["model"],
            engine,
            settings.rollout_resources,
            seed=self._plan["seed"],
            where="grpo.rollout_engine",
            trust_remote_code=self._plan["trust_remote_code"],
            sync=sync_of(settings),
            max_lora_rank=self._plan["lora_rank"],
            place=self._place if slot < settings.rollout_actors else None,  # only those have a bundle there
        )
