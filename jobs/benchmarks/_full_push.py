"""The peer of `weight_sync.py`: every weight of the model is sent to the engine and loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file

from lorapar_ray.engines.actor import EngineActor
from lorapar_ray.engines.policy_loader import PolicyLoader


class FullLoader(PolicyLoader):
    """Runs in vLLM's worker."""

    def full_load(self, file: str) -> None:
        self.model_runner.reload_weights(weights_iterator=iter(load_file(file).items()))


class FullPushEngine(EngineActor):
    """An engine that receives a whole checkpoint as bytes."""

    async def push(self, blob: bytes) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            file = Path(folder) / "model.safetensors"
            file.write_bytes(blob)
            await self._rpc("full_load", str(file))
        await self._forget()
