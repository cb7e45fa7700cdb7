"""A vLLM engine in a Ray actor whose policy can be replaced between steps and asked to prove which one it serves."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapar_ray.config import EngineConfig, Resources


@dataclass(frozen=True)
class Policy:
    """One version of the adapter on its way to an engine: files as bytes, so that it travels as one Ray object."""

    version: int
    tensors: bytes
    """`adapter_model.safetensors`"""
    config: str
    """`adapter_config.json`"""
    digest: str
    """SHA-256 of `tensors`."""


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: list[int]
    logprobs: list[float]
    """Of each token, under the policy and temperature that sampled it."""
    finished: bool
    """False if it was cut at the length limit."""
    version: int
    """Policy version when sampling began; -1 is the base model."""


class EngineActor:
    """Async Ray actor around `vllm.AsyncLLM` (start it with `start_engine`)."""

    def __init__(self, arguments: dict[str, Any], sync: str) -> None:
        self._arguments = arguments
        self._sync = sync
        self._engine: Any = None
        self._version = -1
        self._lora: Any = None
        self._requests = 0

    async def start(self) -> dict[str, int]:
        """Start the engine, once; returns process ids of this actor (for tests that kill it)."""
        if self._engine is None:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            extension = "lorapar_ray.engines.policy_loader.PolicyLoader"
            settings = AsyncEngineArgs(worker_extension_cls=extension, **self._arguments)
            self._engine = AsyncLLM.from_engine_args(settings)
        return {"pid": os.getpid()}

    async def load_policy(self, policy: Policy | None) -> str:
        """Serve `policy` (None: the base) from the next step on; returns the digest of what was loaded."""
        if policy is None:
            digest = "base"
            self._lora = None
            if self._sync == "merged":
                digest = (await self._rpc("lorapar_load_policy", None))[0]
            self._version = -1
        else:
            folder = _spill(policy)
            try:
                if self._sync == "merged":
                    digest = (await self._rpc("lorapar_load_policy", str(folder)))[0]
                else:
                    digest = await self._load_lora(folder, policy)
            finally:
                if self._sync == "merged":
                    shutil.rmtree(folder, ignore_errors=True)
            self._version = policy.version
        await self._engine.reset_prefix_cache()
        return digest

    async def _load_lora(self, folder: Path, policy: Policy) -> str:
        import hashlib

        from vllm.lora.request import LoRARequest

        previous = self._lora
        # the name carries the version: a re-used adapter name may be answered from stale key-value entries
        self._lora = LoRARequest(f"policy-{policy.version}", policy.version + 1, str(folder))
        await self._engine.add_lora(self._lora)
        if previous is not None:
            await self._engine.remove_lora(previous.lora_int_id)
            shutil.rmtree(previous.lora_path, ignore_errors=True)
        return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()

    async def generate(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[list[Completion]]:
        """Sample `sampling["n"]` completions of every prompt, all in flight together."""
        return list(await asyncio.gather(*(self._complete(ids, sampling, i) for i, ids in enumerate(prompts))))

    async def _complete(self, prompt_ids: list[int], sampling: dict[str, Any], index: int) -> list[Completion]:
        from vllm import SamplingParams

        version = self._version
        seed = sampling.get("seed")
        own = {**sampling, "seed": None if seed is None else seed + index, "logprobs": 0}
        output = await self._run(prompt_ids, SamplingParams(**own))
        return [
            Completion(
                token_ids=list(choice.token_ids),
                logprobs=[entry[token].logprob for entry, token in zip(choice.logprobs, choice.token_ids, strict=True)],
                finished=choice.finish_reason == "stop",
                version=version,
            )
            for choice in output.outputs
        ]

    async def score(self, token_ids: list[int], start: int) -> list[float]:
        """Log-probabilities of `token_ids[start:]` under the served policy."""
        from vllm import SamplingParams

        output = await self._run(token_ids, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0))
        pairs = list(zip(output.prompt_logprobs, token_ids, strict=True))[start:]
        return [entry[token].logprob for entry, token in pairs]

    async def _run(self, prompt_ids: list[int], params: Any) -> Any:
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params.output_kind = RequestOutputKind.FINAL_ONLY  # one output with all n completions, none in between
        self._requests += 1
        last = None
        try:
            stream = self._engine.generate(
                {"prompt_token_ids": prompt_ids}, params, request_id=str(self._requests), lora_request=self._lora
            )
            async for output in stream:
                last = output
        except EngineDeadError:
            os._exit(1)  # a live actor around a dead engine would answer for ever with errors; let Ray replace it
        return last

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = await self._engine.collective_rpc(method, args=args)
        return answers


def start_engine(
    model_path: str,
    engine: EngineConfig,
    resources: Resources,
    *,
    seed: int,
    trust_remote_code: bool = False,
    sync: str = "merged",
    max_lora_rank: int | None = None,
) -> Any:
    """Create the actor and begin starting its engine; returns the handle (await `handle.start.remote()`)."""
    import ray

    from lorapar_ray.engines.settings import engine_arguments, engine_environment

    arguments = engine_arguments(model_path, engine, seed=seed, trust_remote_code=trust_remote_code)
    if sync == "adapter":
        allowed = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= (max_lora_rank or 8))
        arguments |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": allowed}
    actor = ray.remote(EngineActor).options(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_concurrency=1000,
        runtime_env={"env_vars": engine_environment(engine, resources)},
    )
    return actor.remote(arguments, sync)


def _spill(policy: Policy) -> Path:
    """Write a policy where every process of this machine can map it; complete before its name exists."""
    shared = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="lorapar-", dir=shared if shared.is_dir() else None))
    (root / "adapter_model.safetensors").write_bytes(policy.tensors)
    (root / "adapter_config.json").write_text(policy.config)
    return root


def read_policy(adapter: Path, version: int) -> Policy:
    """An adapter directory as a policy."""
    import hashlib

    tensors = (adapter / "adapter_model.safetensors").read_bytes()
    return Policy(version, tensors, (adapter / "adapter_config.json").read_text(), hashlib.sha256(tensors).hexdigest())
