"""Between rollout engines and learners: who samples what under which policy, and what each learner gets.

One asynchronous task per optimiser step samples the step's groups and scores them. A step may begin as soon as a policy
at most `max_staleness` versions old is being served: 0 is strictly on-policy, 1 or more overlaps sampling with training
and bounds the queue to that many finished steps. An engine that dies is replaced, brought to the current policy, and
its prompts are asked again.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.actor import Policy, start_engine
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.batches import Batch, Canary, Clock, Group, canary_gap, make_batch, score_groups, share_of
from lorapar_ray.grpo.prompts import PromptStream
from lorapar_ray.grpo.rewards import RewardPool, RewardSpec

ENGINE_REPLACEMENTS = 5
"""Dead engines replaced over a run before it stops: more than that is a broken setup, not bad luck."""


class PolicyMismatch(UserError):
    """An engine does not serve the policy it was sent: nothing sampled from it may be trained on."""


class Coordinator:
    """Async Ray actor; owns the rollout engines, the reward processes and the prompt stream."""

    def __init__(self, plan: dict[str, Any]) -> None:
        """Take the plan: `settings` (GrpoConfig), `rows` (id, prompt, response, answer, prompt_ids), `steps`, `seed`,
        `model` (path), `trust_remote_code` and `lora_rank`, all JSON-like."""
        from lorapar_ray.datasets.chat import load_encoder

        self._plan = plan
        self._settings = GrpoConfig.model_validate(plan["settings"])
        self._rows: list[dict[str, Any]] = plan["rows"]
        self._tokenizer = load_encoder(plan["model"], None, plan["trust_remote_code"]).tokenizer
        self._stream = PromptStream(len(self._rows), plan["seed"])
        self._engines: list[Any] = []
        self._load: list[int] = []
        self._replaced = 0
        self._replacing = asyncio.Lock()
        self._policy: Policy | None = None
        self._steps: dict[int, asyncio.Task[Batch]] = {}
        self._drawn: dict[int, list[int]] = {}
        self._first_step = 0
        self._mismatch: PolicyMismatch | None = None
        self._rewards = RewardPool(
            [RewardSpec(reward.name, reward.weight) for reward in self._settings.rewards],
            time_limit_s=self._settings.reward_time_limit_s,
            memory_limit_mb=self._settings.reward_memory_mb,
        )

    async def start(self) -> list[dict[str, int]]:
        """Start every rollout engine; returns their process ids."""
        self._engines = [self._new_engine() for _ in range(self._settings.rollout_actors)]
        self._load = [0] * len(self._engines)
        return list(await asyncio.gather(*(engine.start.remote() for engine in self._engines)))

    async def resume(self, step: int, stream: dict[str, Any] | None) -> None:
        """Begin (again) at `step`: forget every unfinished step, and continue the prompts where the checkpoint was."""
        if self._mismatch is not None:
            raise self._mismatch  # a restarted learner would only repeat it
        for task in self._steps.values():
            task.cancel()
        self._steps.clear()
        self._drawn.clear()
        self._first_step = step
        self._stream = PromptStream(len(self._rows), self._plan["seed"])
        if stream is not None:
            self._stream.restore(stream)

    async def publish(self, policy: Policy, canaries: list[Canary]) -> dict[str, float]:
        """Serve `policy` on every engine and check that they do; sampling that waited for it begins.

        Returns:
            seconds of the sync and the largest canary gap (mean absolute log-probability difference in nats).

        Raises:
            PolicyMismatch: an engine loaded other bytes, or its log-probabilities are off by more than
                `grpo.canary_tolerance`.
        """
        start = time.monotonic()
        self._policy = policy
        try:
            gaps = await asyncio.gather(*(self._serve(slot, policy, canaries) for slot in range(len(self._engines))))
        except PolicyMismatch as mismatch:
            self._mismatch = mismatch
            raise
        for step in range(max(self._first_step, policy.version), policy.version + self._settings.max_staleness + 1):
            if step not in self._steps and step < self._plan["steps"]:
                self._steps[step] = asyncio.create_task(self._sample(step))
        return {"seconds/sync": time.monotonic() - start, "canary_gap": max(gaps)}

    async def batch(self, step: int, rank: int, world: int) -> Batch:
        """This rank's share of a step's samples: whole groups, dealt out by length so that ranks carry equal weight."""
        whole = await self._steps[step]
        for finished in [at for at in self._steps if at < step]:
            del self._steps[finished], self._drawn[finished]
        return share_of(whole, rank, world)

    async def checkpoint(self, step: int) -> dict[str, Any]:
        """State of the prompt stream as it is after training on `step`."""
        return self._stream.state([index for at, drawn in sorted(self._drawn.items()) if at > step for index in drawn])

    async def stop(self) -> None:
        """End reward processes and engines."""
        import ray

        self._rewards.close()
        for engine in self._engines:
            ray.kill(engine)

    async def _sample(self, step: int) -> Batch:
        """Sample and score one step's groups; those whose rewards are all equal teach nothing and are refilled."""
        settings = self._settings
        clock = Clock()
        groups: list[Group] = []
        dropped: list[Group] = []
        failures = 0
        for attempt in range(settings.refill_limit + 1):
            missing = settings.prompts_per_step - len(groups)
            indices = self._stream.take(missing)
            self._drawn.setdefault(step, []).extend(indices)
            with clock.phase("rollout"):
                sampled = await asyncio.gather(*(self._group(index, step, attempt) for index in indices))
            with clock.phase("reward"):
                failures += await asyncio.to_thread(score_groups, self._rewards, sampled)
            groups += [group for group in sampled if group.spread > 0]
            dropped += [group for group in sampled if group.spread == 0]
            if len(groups) == settings.prompts_per_step:
                break
        return make_batch(groups, dropped, failures, settings, self._drawn[step], clock.seconds)

    async def _group(self, index: int, step: int, attempt: int) -> Group:
        row = self._rows[index]
        sampling = {
            "n": self._settings.group_size,
            "temperature": self._settings.temperature,
            "max_tokens": self._settings.max_completion_length,
            "stop": list(self._settings.stop),
            "seed": zlib.crc32(f"{self._plan['seed']}/{step}/{attempt}/{index}".encode()),
        }
        completions = await self._on_some_engine(lambda engine: engine.generate.remote([row["prompt_ids"]], sampling))
        return Group(row=row, completions=completions[0], texts=[self._decode(c.token_ids) for c in completions[0]])

    async def _on_some_engine(self, call: Callable[[Any], Any]) -> Any:
        """Run `call` on the least loaded engine; if that dies, on its replacement."""
        import ray

        while True:
            slot = min(range(len(self._engines)), key=self._load.__getitem__)
            engine = self._engines[slot]
            self._load[slot] += 1
            try:
                return await call(engine)
            except ray.exceptions.RayActorError:
                await self._replace(slot, engine)
            finally:
                self._load[slot] -= 1

    async def _replace(self, slot: int, dead: Any) -> None:
        """Start another engine in `slot` and bring it to the current policy; one caller does it, the others wait."""
        async with self._replacing:
            if self._engines[slot] is not dead:
                return
            self._replaced += 1
            if self._replaced > ENGINE_REPLACEMENTS:
                raise RuntimeError(f"{self._replaced} rollout engines died; see the Ray logs of EngineActor")
            fresh = self._new_engine()
            await fresh.start.remote()
            if self._policy is not None:
                await fresh.load_policy.remote(self._policy)
            self._engines[slot] = fresh

    async def _serve(self, slot: int, policy: Policy, canaries: list[Canary]) -> float:
        import ray

        while True:
            engine = self._engines[slot]
            try:
                loaded = await engine.load_policy.remote(policy)
                if loaded != policy.digest:
                    raise PolicyMismatch(
                        f"rollout engine {slot} loaded {loaded[:9]} as policy {policy.version}, not {policy.digest[:9]}"
                    )
                scored = await asyncio.gather(*(engine.score.remote(c.token_ids, c.start) for c in canaries))
            except ray.exceptions.RayActorError:
                await self._replace(slot, engine)
                continue
            gap = canary_gap(canaries, scored)
            if gap > self._settings.canary_tolerance:
                raise PolicyMismatch(
                    f"rollout engine {slot} does not serve policy {policy.version}: its log-probabilities of the "
                    f"canary tokens are {gap:.3f} nats off (grpo.canary_tolerance {self._settings.canary_tolerance:g})"
                )
            return gap

    def _new_engine(self) -> Any:
        settings = self._settings
        return start_engine(
            self._plan["model"],
            settings.rollout_engine,
            settings.rollout_resources,
            seed=self._plan["seed"],
            trust_remote_code=self._plan["trust_remote_code"],
            sync=settings.sync,
            max_lora_rank=self._plan["lora_rank"],
        )

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
