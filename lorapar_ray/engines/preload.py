"""Imports for a fork server: the modules that every engine's core imports.

Nothing here may start a thread or touch a GPU, since neither survives a fork. vLLM itself forks after importing its
core. Its GPU worker is left to the forked process: it imports CUDA libraries (flash attention, Triton's kernels), any
of which may ask the GPU something. On a CPU that takes an eighth of the core's time.
"""

import contextlib

from lorapar_ray.heavy_imports import import_when_used, without_collecting

with contextlib.suppress(ImportError):
    import setproctitle

    setproctitle.getproctitle()  # locates the title's memory; this fails after the environment has moved

import_when_used("scipy.signal")
with without_collecting(), contextlib.suppress(ImportError):
    import vllm.v1.engine.core
    from vllm.platforms import current_platform

    import lorapar_ray.engines.policy_loader  # noqa: F401

    if current_platform.is_cpu():
        import vllm.model_executor.models.llama
        import vllm.v1.attention.backends.cpu_attn
        import vllm.v1.worker.cpu_worker  # noqa: F401
