"""A vLLM engine in a Ray actor. Its policy can be replaced between steps, and it can verify which policy it serves."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.adapter_files import AdapterFiles
from lorapar_ray.engines.canaries import mean_gap
from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.in_flight import Growing, InFlight, growing, request_of
from lorapar_ray.engines.mismatch import agreed, verified
from lorapar_ray.engines.phases import Phases
from lorapar_ray.engines.processes import start_async_llm
from lorapar_ray.engines.record import GroupHead, GroupRecord
from lorapar_ray.engines.scoring import DECODING, sampled_logprobs, sampling_params, scored, scoring_params
from lorapar_ray.engines.settings import LOADER, engine_arguments, engine_environment, lora_arguments, memory_share
from lorapar_ray.models import resolve_model
from lorapar_ray.workers import ray_options

if TYPE_CHECKING:  # imports torch, which the fork server would wait for
    from numpy.typing import NDArray

    from lorapar_ray.engines.policy import Policy, PolicyReceiver
    from lorapar_ray.engines.policy_transport import DirectPolicy

WATCH_S = 1.0
"""Seconds between two checks that the engine lives."""
UNVERIFIED = "unverified"
"""In place of the digest of a policy that is being loaded, or was refused."""
PROOF = -1
"""Priority of requests that verify a policy: before waiting sequences (0), since the learner waits for them."""


class Served:
    """The policy that an engine serves, or one of several if runs share the engine."""

    def __init__(self) -> None:
        self.version = -1
        self.digest = "base"
        self.lora: Any = None
        self.receiver: PolicyReceiver | None = None
        self.loading = asyncio.Lock()
        self.open = asyncio.Event()
        """Not set while a policy is loaded: requests wait."""
        self.open.set()

    def adapter(self, policy: Policy) -> bytes:
        """The whole adapter file of `policy`."""
        from lorapar_ray.engines.policy import PolicyReceiver

        self.receiver = self.receiver or PolicyReceiver()
        return self.receiver.adapter(policy)


class EngineActor:
    """Async Ray actor around `vllm.AsyncLLM` (start it with `start_engine`)."""

    def __init__(self, arguments: dict[str, Any], sync: str, where: str = "engine") -> None:
        self._arguments = arguments
        self._sync = sync
        self._where = where
        self._engine: Any = None
        self._starting = asyncio.Lock()
        self._files = AdapterFiles()
        self._served: defaultdict[int, Served] = defaultdict(Served)
        """By arm; an engine of one run serves arm 0 only."""
        self._loads = 0
        self._using: Counter[int] = Counter()
        self._requests = 0
        self._groups: dict[tuple[int, str], InFlight] = {}
        """By arm and key; also those that wait for a policy to be loaded."""
        self._watch: asyncio.Task[None] | None = None
        self._leaving = False
        self._phases = Phases("engine")

    async def start(self) -> dict[str, Any]:
        """Start the engine, once; returns this actor's process id (`pid`) and what each phase took (`seconds`).

        Raises:
            UserError: this machine lacks the model, or vLLM cannot serve it with these settings.
        """
        async with self._starting:  # runs that share it ask at the same time
            if self._engine is None:
                loader = {"worker_extension_cls": LOADER}
                model = resolve_model(self._arguments["model"])
                self._engine = start_async_llm({**loader, **self._arguments, "model": model}, self._phases, self._where)
                self._watch = asyncio.create_task(self._leave_with_the_engine())
                await self._rpc("lorapar_prepare")
        return {"pid": os.getpid(), "seconds": self._phases.seconds}

    async def load_policy(
        self, policy: Policy | DirectPolicy | None, whole: Policy | DirectPolicy | None = None, arm: int = 0
    ) -> str:
        """Serve `policy` (None: the base) from the next engine step on; returns the digest of what every rank loaded.

        Requests in flight continue with it (`merged`) or with their old policy (`adapter`); drain them first to prevent
        this. New requests wait until it is loaded. Prefix cache entries are salted with the policy's digest, so no
        entry of another policy is used.

        Args:
            whole: the whole policy to which the changes in `policy` apply, for an engine that has not received it.
            arm: which policy is replaced, if several runs share this engine (`adapter`).

        Raises:
            PolicyMismatch: a rank loaded another policy, or does not compute with it.
        """
        from lorapar_ray.engines.policy_transport import received

        served = self._served[arm]
        async with served.loading:  # policies of a dead learner and of its successor are loaded one after the other
            new = None if policy is None else await received(policy)
            earlier = await received(whole) if whole is not None and served.receiver is None else None
            served.open.clear()
            try:
                if earlier is not None:
                    served.adapter(earlier)
                return await self._load(new, served)
            finally:
                served.open.set()

    async def _load(self, policy: Policy | None, served: Served) -> str:
        folder = None if policy is None else self._files.write(served.adapter(policy), policy.config)
        version = -1 if policy is None else policy.version
        try:
            load = self._load_merged if self._sync == "merged" else self._load_lora
            served.digest = UNVERIFIED  # nobody may take a refused policy for the one before
            digest = await load(folder, version, served)
            served.version = version
            await self._forget()
            served.digest = verified([digest], await self._check(folder, served))
            return served.digest
        finally:
            if folder is not None and self._sync == "merged":
                shutil.rmtree(folder, ignore_errors=True)

    async def _load_merged(self, folder: Path | None, version: int, served: Served) -> str:
        """The digest that every rank of the engine read."""
        return agreed(await self._rpc("lorapar_load_policy", None if folder is None else str(folder)))

    async def _check(self, folder: Path | None, served: Served) -> list[tuple[str, str]]:
        """Of each rank, the digest of what it compared with what it computes with, and what differs."""
        if self._sync == "merged":
            return await self._rpc("lorapar_check_merged", None if folder is None else str(folder))
        if folder is None:
            return []
        return await self._rpc("lorapar_check_adapter", served.lora.lora_int_id, str(folder))

    def _salt(self, arm: int = 0) -> str:
        """The salt that separates the prefix cache entries of policies."""
        return f"policy {self._served[arm].digest}"

    async def _forget(self) -> None:
        """Free the entries that no later prompt can match; does nothing while requests are in flight."""
        with self._alive():
            await self._engine.reset_prefix_cache()

    async def _load_lora(self, folder: Path | None, version: int, served: Served) -> str:
        import hashlib

        from vllm.lora.request import LoRARequest

        previous = served.lora
        if folder is None:
            served.lora = None
            return "base"
        self._loads += 1  # vLLM never reads a number or name twice, even if the folder has changed
        lora = LoRARequest(f"policy-{version}-{self._loads}", self._loads, str(folder))
        with self._alive():
            await self._engine.add_lora(lora)
            served.lora = lora
        if previous is not None and not self._using[previous.lora_int_id]:
            await self._drop(previous)
        return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()

    async def _drop(self, lora: Any) -> None:
        """Remove an adapter that no request uses any more; if one still does, vLLM reads it again."""
        with self._alive():
            await self._engine.remove_lora(lora.lora_int_id)
        shutil.rmtree(lora.lora_path, ignore_errors=True)

    async def generate(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[list[Completion]]:
        """Sample `sampling["n"]` completions of every prompt, all in flight together."""
        return list(await asyncio.gather(*(self._complete(ids, sampling, i) for i, ids in enumerate(prompts))))

    async def rollout(
        self,
        prompt_ids: Sequence[int] | NDArray[Any],
        sampling: dict[str, Any],
        key: str = "",
        begun: GroupRecord | Mapping[str, GroupRecord] | None = None,
        arm: int = 0,
    ) -> tuple[GroupRecord, GroupHead]:
        """Sample `sampling["n"]` completions of one prompt; call with `num_returns=2`.

        The caller owns both objects, so a record outlives this actor while its node lives.

        Args:
            key: names the group among those of its arm in flight.
            begun: tokens that another engine has already sampled, of this group or of several by key; this engine
                continues them.
        """
        served = self._served[arm]
        earlier = begun.get(key) if isinstance(begun, Mapping) else begun
        group = InFlight(np.asarray(prompt_ids).tolist(), growing(sampling["n"], served.version, earlier))
        self._groups[arm, key] = group
        try:
            await served.open.wait()
            group.begin(served.version)
            await asyncio.gather(
                *(
                    self._grow(group, each, request_of(each, sampling, index), arm)
                    for index, each in enumerate(group.completions)
                    if not each.ended
                )
            )
        finally:
            del self._groups[arm, key]
        record = group.record
        return record, record.head

    async def _grow(self, group: InFlight, each: Growing, request: dict[str, Any], arm: int) -> None:
        if group.given_back:
            return
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**request)
        params.output_kind = RequestOutputKind.DELTA
        self._requests += 1
        each.request = str(self._requests)
        async for output in self._stream([*group.prompt_ids, *each.token_ids], params, each.request, arm=arm):
            each.take(output.outputs[0])

    async def progress(self, arm: int = 0) -> tuple[dict[str, GroupRecord], dict[str, int]]:
        """The arm's groups in flight with their tokens so far, and each one's number of tokens, by key; call with
        `num_returns=2`.

        An answer is also the heartbeat: it comes from the engine's workers, between two of their steps.
        """
        await self._rpc("lorapar_alive")
        records = {key: group.record for (whose, key), group in self._groups.items() if whose == arm}
        return records, {key: len(record.token_ids) for key, record in records.items()}

    async def give_back(self, key: str, arm: int = 0) -> None:
        """Stop a group: its `rollout` then returns the tokens sampled so far."""
        group = self._groups.get((arm, key))
        if group is not None and (requests := group.give_back()):
            with self._alive():
                await self._engine.abort(requests)

    async def _complete(
        self, prompt_ids: list[int], sampling: dict[str, Any], index: int, priority: int = 0, arm: int = 0
    ) -> list[Completion]:
        served = self._served[arm]
        await served.open.wait()
        version = served.version
        seed = sampling.get("seed")
        own = {**sampling, "seed": None if seed is None else seed + index}
        output = await self._run(prompt_ids, sampling_params(own), priority, arm)
        return [
            Completion(
                token_ids=list(choice.token_ids),
                logprobs=sampled_logprobs(choice),
                finished=choice.finish_reason == "stop",
                version=version,
            )
            for choice in output.outputs
        ]

    async def score(self, token_ids: list[int], start: int, arm: int = 0) -> list[float]:
        """Log-probabilities of `token_ids[start:]` under the served policy."""
        await self._served[arm].open.wait()
        return scored(await self._run(token_ids, scoring_params(), PROOF, arm), token_ids, start)

    async def cache_gap(self, token_ids: list[int], arm: int = 0) -> float:
        """Mean absolute difference, in nats, between decoding after `token_ids` and computing the same tokens without
        the cache.

        Decoding reads the prefix cache, like rollouts; prompt log-probabilities never do. So stale entries of another
        policy are detected here.
        """
        [done] = await self._complete(token_ids, DECODING, 0, priority=PROOF, arm=arm)
        afresh = await self.score([*token_ids, *done.token_ids], len(token_ids), arm)
        return mean_gap(done.logprobs, afresh)

    async def leave(self) -> None:
        """End the engine's processes, which may not respond any more; the caller then ends this actor (`ray.kill`)."""
        import psutil

        self._leaving = True
        for child in psutil.Process().children(recursive=True):
            child.kill()
        self._files.close()

    async def _run(self, prompt_ids: list[int], params: Any, priority: int = 0, arm: int = 0) -> Any:
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.FINAL_ONLY  # one output with all n completions, none in between
        self._requests += 1
        last = None
        async for output in self._stream(prompt_ids, params, str(self._requests), priority, arm):
            last = output
        return last

    async def _stream(
        self, prompt_ids: list[int], params: Any, request: str, priority: int = 0, arm: int = 0
    ) -> AsyncIterator[Any]:
        """The engine's outputs of a request, with the policy that is served at its start."""
        served = self._served[arm]
        lora = served.lora
        held = -1 if lora is None else lora.lora_int_id
        prompt = {"prompt_token_ids": prompt_ids, "cache_salt": self._salt(arm)}
        self._using[held] += 1
        try:
            with self._alive():
                async for output in self._engine.generate(
                    prompt, params, request_id=request, lora_request=lora, priority=priority
                ):
                    yield output
        finally:
            self._using[held] -= 1
        if lora is not None and lora is not served.lora and not self._using[held]:
            await self._drop(lora)

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        with self._alive():
            answers: list[Any] = await self._engine.collective_rpc(method, args=args)
        return answers

    async def _leave_with_the_engine(self) -> None:
        """Exit once the engine is dead: vLLM never answers calls to its workers that were in flight at that moment."""
        while not self._engine.errored:
            await asyncio.sleep(WATCH_S)
        self._leave_at_once()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Exit with a dead engine: without one the actor returns only errors, and its owner replaces a dead actor."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError:
            self._leave_at_once()
            raise

    def _leave_at_once(self) -> None:
        """Does nothing while this actor is being ended on purpose, so that Ray's log reports no dead worker."""
        if not self._leaving:
            os._exit(1)


def start_engine(
    model_path: str,
    engine: EngineConfig,
    resources: Resources,
    *,
    seed: int,
    where: str = "engine",
    trust_remote_code: bool = False,
    sync: str = "merged",
    max_lora_rank: int | None = None,
    adapters: int = 2,
    placement_group: Any = None,
    actor: type[EngineActor] = EngineActor,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Create the actor and begin starting its engine; returns the handle (await `handle.start.remote()`).

    Args:
        model_path: as the config has it, or as `models.model_reference` gives it; the actor's machine resolves it.
        where: the config's field that holds `engine`, for error messages.
        adapters: policies that it computes with at once (`adapter`): those that it serves, and those of requests that
            may still be in flight when it is sent another.
        placement_group: with a bundle for this engine; None: anywhere.
        actor, environment: another kind of engine, and additional environment variables.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    arguments = memory_share(resources) | engine_arguments(
        model_path, engine, seed=seed, trust_remote_code=trust_remote_code
    )
    if sync == "adapter":
        arguments |= lora_arguments(max_lora_rank or 8, adapters)
    asked = ray_options(resources)
    if placement_group is not None:  # whose bundles say which nodes
        asked = {
            **asked,
            "label_selector": None,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group),
        }
    remote = ray.remote(actor).options(
        **asked,
        max_concurrency=10_000,  # each turn of an environment is a call; verifying a policy must not wait for them
        runtime_env={"env_vars": {**engine_environment(engine, resources), **(environment or {})}},
    )
    return remote.remote(arguments, sync, where)
