"""The resources of a process, and the settings of a vLLM engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from lorapar_ray.config.base import Dtype, NonNegative, PositiveFloat, PositiveInt, Section
from lorapar_ray.config.marks import Operation, Result, result_but_not

OPERATIONAL_EXTRA = (
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "swap_space", "cpu_offload_gb", "block_size"),
    *("max_num_batched_tokens", "max_num_partial_prefills", "max_parallel_loading_workers", "scheduling_policy"),
    *("enable_chunked_prefill", "enable_prefix_caching", "async_scheduling", "compilation_config", "cudagraph_mode"),
    *("pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend", "disable_custom_all_reduce"),
    *("disable_log_stats", "download_dir", "load_format"),
)
"""Arguments of vLLM about memory, batching, caching and placement."""
RANDOM_WEIGHTS = ("load_format", "dummy")
"""Every other format of the weights' files has the same weights."""


class Resources(Section):
    """Resources that one process of a stage requests from Ray."""

    cpus: Operation[NonNegative] = 1.0
    """CPUs that one process requests from Ray; may be a fraction."""
    gpus: Operation[NonNegative | Literal["auto"]] = "auto"
    """`auto`: a share of the cluster's GPUs, computed by `lorapar_ray.gpus`; 0 if the cluster has no GPU. A number is
    passed to Ray unchanged; with 0 the process sees no GPU, which an engine of a vLLM for GPUs refuses."""
    threads: Operation[PositiveInt | None] = None
    """CPU threads; None: as many as `cpus`. A larger number helps if processes compute in turns. An engine with several
    threads and less than one of `cpus` lets them sleep while they wait for each other, instead of taking others'
    time."""
    nodes: Operation[dict[str, str]] = {}
    """Only on nodes with these labels, such as `{group: rollouts}`; a value may be a Ray label selector: `"in(a, b)"`,
    `"!spot"`. Empty: any node."""

    @property
    def gpu_count(self) -> float:
        """GPUs to request from Ray; `auto` counts as 0 until `lorapar_ray.gpus.place` replaces it by a number."""
        return 0.0 if self.gpus == "auto" else self.gpus

    @property
    def compute_threads(self) -> int:
        """Threads one process should use."""
        return self.threads or max(1, round(self.cpus))

    @property
    def shares_cores(self) -> bool:
        """Whether its threads compute on cores that others use at the same time."""
        return self.cpus < 1 < self.compute_threads


class EngineConfig(Section):
    """Settings of one vLLM engine, for teachers, rollouts and evaluation."""

    dtype: Result[Dtype] = "auto"
    """Number format of weights and computation; `auto`: bfloat16 if the device supports
    it, else float32."""
    max_model_len: Result[PositiveInt] = 1024
    """Tokens of a prompt and its completion together."""
    max_num_seqs: Operation[PositiveInt] = 64
    """Sequences in one batch of the engine."""
    tensor_parallel: Operation[PositiveInt] = 1
    """GPUs (ranks) that share the model's weights (tensor parallelism)."""
    enforce_eager: Operation[bool] = False
    """No CUDA graphs and no compiling: a faster start, slower steps."""
    kv_cache_gib: Operation[PositiveFloat] = 1.0
    """CPU only: size of the key-value cache, rounded to whole GiB, at least 1. On a GPU set
    `extra: {gpu_memory_utilization: ...}`."""
    extra: Annotated[dict[str, Any], result_but_not(*OPERATIONAL_EXTRA, still=(RANDOM_WEIGHTS,))] = {}
    """Further arguments, passed to vLLM unchanged. Those in `OPERATIONAL_EXTRA` do not change results, except for
    `load_format: dummy`, which draws random weights; any other counts as changing them."""


def require_gpu_for_each_rank(place: str, resources: Resources, name: str, engine: EngineConfig) -> None:
    gpus, ranks = resources.gpu_count, engine.tensor_parallel
    if gpus and gpus != ranks and not (gpus < 1 and ranks == 1):
        raise ValueError(
            f"{place}.gpus: {gpus:g} for {name}.tensor_parallel {ranks}; give each rank a GPU, or one rank a fraction"
        )


def require_apart(name: str, count: int, place: str, gpus: float) -> None:
    """Check that no two workers of a training group can be placed on one GPU: NCCL refuses two ranks there.

    Raises:
        ValueError: they can.
    """
    if count > 1 and 0 < gpus <= 0.5:
        raise ValueError(
            f"{place}.gpus: with {gpus:g} two of {count} {name} may meet on one GPU, which NCCL refuses; give each 1, "
            f"or set {name}: 1"
        )
