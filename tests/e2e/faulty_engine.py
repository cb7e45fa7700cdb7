"""Fault injection: engines that claim to serve a policy and do not.

The file that `FAULT` names holds the fault. It is read at each load, so that one engine can have all faults in turn.
"""

import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from lorapar_ray.engines.actor import EngineActor
from lorapar_ray.engines.policy_loader import PolicyLoader

FAULT = "LORAPAR_TEST_FAULT"


def fault() -> str:
    return Path(os.environ[FAULT]).read_text()


class FaultyLoader(PolicyLoader):
    """Always returns the digest of the given file."""

    def lorapar_load_policy(self, adapter: str | None) -> str:
        kind = fault()
        if adapter is None or kind in ("none", "cache"):
            return super().lorapar_load_policy(adapter)
        file = Path(adapter) / "adapter_model.safetensors"
        honest = hashlib.sha256(file.read_bytes()).hexdigest()
        state = load_file(file)
        if kind == "half":
            state = {key: value * (index % 4 < 2) for index, (key, value) in enumerate(sorted(state.items()))}
        elif kind == "wrong":
            state = {key: -value if ".lora_B." in key else value for key, value in state.items()}
        elif kind == "scale":
            config = Path(adapter) / "adapter_config.json"
            settings = json.loads(config.read_text())
            config.write_text(json.dumps({**settings, "lora_alpha": 4 * settings["lora_alpha"]}))
        if kind != "stale":
            save_file(state, file)
            super().lorapar_load_policy(adapter)
        return "another adapter" if kind == "digest" else honest


class FaultyEngine(EngineActor):
    """With the fault `cache`, key-value entries outlive their policy."""

    def _salt(self, arm: int = 0) -> str:
        return "same" if fault() == "cache" else super()._salt(arm)

    async def _forget(self) -> None:
        if fault() != "cache":
            await super()._forget()
