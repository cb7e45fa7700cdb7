"""vLLM's GPU worker for an engine with a part of a GPU: it sizes its cache by its own memory use.

vLLM measures its own memory use by the change of the whole GPU's free memory while it profiles. If engines start at the
same time, or a learner loads its model meanwhile, this counts their allocations, and vLLM stops if they free memory.
Here the cache is the engine's part of the GPU minus this process's peak allocation: other processes do not count.
"""

from __future__ import annotations

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu_worker import Worker

from lorapar_ray.engines.settings import cache_room


class SharedGpuWorker(Worker):
    """For `worker_cls` of an engine with less than a whole GPU."""

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """Bytes for the key-value cache.

        Raises:
            ValueError: the model alone fills the engine's part.
        """
        if self.cache_config.kv_cache_memory_bytes:
            given: int = super().determine_available_memory()
            return given
        torch.cuda.reset_peak_memory_stats(self.device)
        self.model_runner.profile_run()
        torch.cuda.synchronize(self.device)
        graphs = self.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
        room = cache_room(self.requested_memory, torch.cuda.max_memory_reserved(self.device), graphs=graphs)
        torch.cuda.empty_cache()
        return room
