"""Connects rollout engines and learners: decides which policy samples each step, and each learner's share.

One asynchronous task per optimiser step runs `loop.collect`. A step may begin once the served policy is at most
`max_staleness` versions old: 0 is strictly on-policy; 1 or more overlaps sampling with training, and the queue holds at
most that many finished steps.

Tokens and weights do not pass through this process. It holds a group's reference, lengths and rewards, and a policy's
digest and reference; tokens, texts and weights go directly from producer to reader through Ray's object store. It (or
a shard) owns the groups' records, so they outlive their engine; a record that is lost with its node is sampled again.

With many engines, requests to engines and reward workers are handled by several processes: see `shards.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.canaries import MOST_TOLERANCE, Canary, canary_tolerance
from lorapar_ray.engines.mismatch import PolicyMismatch
from lorapar_ray.engines.policy import PolicyNote
from lorapar_ray.grpo.balance import Balance
from lorapar_ray.grpo.batches import Batch, Share, shares_of
from lorapar_ray.grpo.failures import Failures
from lorapar_ray.grpo.loop import collect
from lorapar_ray.grpo.prompt_stream import PromptStream
from lorapar_ray.grpo.rewards.actor import RewardActor
from lorapar_ray.grpo.sampler import Sampler
from lorapar_ray.grpo.shards import Shards, shard_count

OTHER_MODEL = "see model.dtype, model.quantization and grpo.rollout_engine, or set grpo.canary_tolerance to a number"
"""What to do if learner and engines have different models."""


class Coordinator:
    """Async Ray actor; owns the rollout engines, the reward workers and the prompt stream.

    They all end with it. If Ray restarts it, the learners and the coordinator resume from the learners' checkpoint.
    """

    def __init__(
        self,
        plan: dict[str, Any],
        engine: Callable[[int], Any] | None = None,
        placement_group: Any = None,
        reward_worker: type[Any] = RewardActor,
    ) -> None:
        """Take the plan, and arguments that are not plain data.

        Args:
            plan: `settings` (GrpoConfig), `rows` (a sequence of questions, see `TokenTable.question`), `steps`,
                `seed`, `model` (see `models.model_reference`), `trust_remote_code`, `lora_rank`, `judge` (see
                `judging`; None without one) and perhaps `withheld` (environment variables that rewards do not see),
                `arms` (runs that share the engines) and `adapters` (policies of all of them in use at once).
            engine: creates the engine of a place, from 0; default: from the plan.
            placement_group: with the engines' bundles; None: there is none.
            reward_worker: the function of a reward worker.
        """
        self._plan = plan
        self._settings = GrpoConfig.model_validate(plan["settings"])
        self._stream = self._fresh_stream()
        asked = self._settings.canary_tolerance
        self._tolerance = None if asked == "auto" else asked
        shards, own = shard_count(self._settings), (engine, placement_group, reward_worker)
        self._sampler = Sampler(plan, *own) if shards == 1 else Shards(plan, shards, *own)
        self._failures = Failures()
        self._lost = 0
        """Groups whose records a learner found lost."""
        self._steps: dict[int, asyncio.Task[Batch]] = {}
        self._drawn: dict[int, list[int]] = {}
        self._shares: dict[int, list[Share]] = {}
        self._changed = asyncio.Event()
        """Set, and replaced, when a step begins or the run fails."""
        self._first_step = 0
        self._groups_of_learners = 0
        """Groups of learners that have begun; a call of an earlier group may outlive its learner."""
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
        return await self._sampler.start()

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
        self._groups_of_learners += 1
        self._change()
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
        await self._sampler.begin_to_start()  # a restarted coordinator has no engines
        await self._sampler.grow()  # the learners have what they need

    async def make_room(self) -> None:
        """Called before learners restart, which may need the resources of the extra engines."""
        await self._sampler.make_room()

    async def calibrate(self, canaries: list[Canary], least: float) -> float:
        """Set the canary tolerance from the gap on the base without an adapter, once for the run; returns it.

        So a policy cannot loosen its own check: the base is measured before any policy is served.

        Args:
            canaries: with the learner's log-probabilities under the base without an adapter.
            least: the least tolerance, in nats.

        Raises:
            UserError: the gap is too large for one model.
        """
        if self._tolerance is None:
            tolerance = canary_tolerance(await self._sampler.base_gap(canaries), least, OTHER_MODEL)
            await self._sampler.tolerate(tolerance)
            self._tolerance = tolerance
        return self._tolerance

    async def publish(self, policy: PolicyNote, canaries: list[Canary]) -> dict[str, float]:
        """Serve a policy on every engine and verify it; sampling that waited for it begins once it is loaded.

        Returns:
            seconds and bytes of the sync, seconds of the proof beside the sampling that has begun, the largest canary
            gap (mean absolute log-probability difference in nats), the engines' idle share since the last sync, prompts
            of the steps that begin now, available engines, engines replaced so far, groups lost with their nodes so
            far, and finished steps in the queue.

        Raises:
            PolicyMismatch: see `ServedPolicy.load` and `prove`.
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
        counts = await self._sampler.counts()
        available = (start - self._marked_at) * max(self._settings.rollout_actors, counts.working)
        busy = min(1.0, (counts.busy_seconds - self._marked_busy_s) / max(1e-9, available))
        size = self._sizes.pop(policy.version - 1, None)
        if self._balance is not None and size is not None and policy.version > self._first_step + 1:
            self._balance.observe(size, start - self._marked_at)  # the first step includes start-up time
        wanted = self._settings.prompts_per_step if self._balance is None else self._balance.prompts
        self._marked_at, self._marked_busy_s = start, counts.busy_seconds
        await self._sampler.load(policy, canaries)
        loaded = time.monotonic()
        for step in range(max(self._first_step, policy.version), policy.version + self._settings.max_staleness + 1):
            if step not in self._steps and step < self._plan["steps"]:
                drawn = self._drawn[step] = []
                self._sizes[step] = wanted
                self._steps[step] = asyncio.create_task(
                    collect(
                        step,
                        wanted,
                        self._settings.refill_limit,
                        drawn=drawn,
                        stream=self._stream,
                        sampler=self._sampler,
                        failures=self._failures,
                        rows=self._plan["rows"],
                    )
                )
        self._change()
        gap = await self._sampler.prove()  # as the first requests of the engines' next batches
        counts = await self._sampler.counts()
        return {
            "seconds/sync": loaded - start,
            "seconds/proof": time.monotonic() - loaded,
            "sync_bytes": float(policy.size),
            "canary_gap": gap,
            "canary_tolerance": MOST_TOLERANCE if self._tolerance is None else self._tolerance,
            "idle/engines": 1.0 - busy,
            "prompts_per_step": float(wanted),
            "engines": float(counts.working),
            "engines_replaced": float(counts.replaced),
            "groups_lost": float(counts.lost + self._lost),
            "queue_depth": float(sum(self._steps[step].done() for step in self._steps if step >= policy.version)),
        }

    async def batch(self, step: int, rank: int, world: int, packed: bool = True) -> Share:
        """This rank's share of a step's samples, once the step is sampled; see `deal`.

        Args:
            rank: the learner's number among the `world` learners, or groups of learners, that get shares of their own.
            packed: they compute a prompt once for a group's completions.

        Raises:
            Exception: the step cannot begin, since its policy could not be published; or the learners have restarted,
                perhaps in another number.
        """
        group = self._groups_of_learners
        whole = await self._sampled(step)
        if group != self._groups_of_learners:
            raise RuntimeError(f"step {step} was discarded: the learners have restarted")
        for finished in [at for at in self._steps if at < step]:
            del self._steps[finished], self._drawn[finished]
            self._shares.pop(finished, None)
        if step not in self._shares:
            self._shares[step] = shares_of(whole, world, self._settings, packed)
        return self._shares[step][rank]

    async def _sampled(self, step: int) -> Batch:
        """A step's batch; ends early if its policy turns out to be wrong, instead of when all of it is sampled."""
        group = self._groups_of_learners
        while self._failure is None and group == self._groups_of_learners:
            changed = asyncio.ensure_future(self._changed.wait())
            sampling = [self._steps[step]] if step in self._steps else []
            await asyncio.wait([changed, *sampling], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if sampling and sampling[0].done():
                return sampling[0].result()
        raise self._failure or RuntimeError(f"step {step} was discarded: the learners have restarted")

    async def lost(self, step: int, groups: list[int]) -> None:
        """Sample these groups of a step again: a learner found that their records were lost with a node."""
        batch = await self._steps[step]
        for number in groups:
            old = batch.groups[number]
            [new] = await self._sampler.groups([old.index], step, attempt=0)
            if batch.groups[number] is old:  # else another learner, with a part of it, reported it first
                batch.groups[number] = new
                self._lost += 1
        self._shares.pop(step, None)

    async def ping(self) -> None:
        """Do nothing; see `asking.answer_from`."""

    async def checkpoint(self, step: int) -> dict[str, Any]:
        """State of the prompt stream after training on `step`."""
        state = self._stream.state([index for at, drawn in sorted(self._drawn.items()) if at > step for index in drawn])
        return state if self._balance is None else {**state, "balance": self._balance.state()}

    async def stop(self) -> None:
        """End reward workers, environments and engines."""
        await self._sampler.stop()

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
