"""Fault injection: engines that claim to serve a policy and do not.

The file that `FAULT` names holds the fault. It is read at each load, so that one engine can have all faults in turn.
"""

import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorapar_ray.engines.actor import EngineActor, Served
from lorapar_ray.engines.policy_loader import PolicyLoader

FAULT = "LORAPAR_TEST_FAULT"
State = dict[str, Tensor]
OTHER_WEIGHTS = r"modules compute with other weights"
CANARIES = r"log-probabilities of the canary tokens are"
CACHE = r"tokens it decodes after a cached prompt are"
UNKNOWN = r"no LoRA layer for \d+ of the adapter's \d+ modules, for example 'model\.language_model\.layers"
DIGEST = r"ranks loaded different policies|loaded another a"
OTHER_ADAPTERS: dict[str, Callable[[State, State], State]] = {
    "half of the modules": lambda new, _: {
        key: value * (index % 4 < 2) for index, (key, value) in enumerate(sorted(new.items()))
    },
    "the sign": lambda new, _: {key: -value if ".lora_B." in key else value for key, value in new.items()},
    "twice": lambda new, _: {key: 2 * value if ".lora_B." in key else value for key, value in new.items()},
    "the base": lambda new, _: {key: 0 * value if ".lora_B." in key else value for key, value in new.items()},
    "one module as before": lambda new, old: {key: old[key] if one_module(key) else new[key] for key in new},
    "layers swapped": lambda new, _: {swapped(key): value for key, value in new.items()},
    "NaN": lambda new, _: {key: value.where(value < value.max(), torch.nan) for key, value in new.items()},
    "a step of 1e-7 before": lambda new, _: {key: value - 1e-7 for key, value in new.items()},
    "one module a step before": lambda new, _: {key: value - 1e-7 * one_module(key) for key, value in new.items()},
    "rounded to bfloat16": lambda new, _: {key: value.bfloat16().float() for key, value in new.items()},
}
"""What the engine loads instead of the adapter, from it and from the one before."""
MERGED = {
    **dict.fromkeys([*OTHER_ADAPTERS, "nothing loaded", "four times the scaling"], OTHER_WEIGHTS),
    "another digest": DIGEST,
    "another rank's digest": DIGEST,
    "another rank's weights": rf"on its rank 1, .*{OTHER_WEIGHTS}",
    "changed after the check": CANARIES,
    "the cache of another policy": CACHE,
}
"""Every fault with `sync: merged`, and what the error says."""
ADAPTER = {
    **{name: says for name, says in MERGED.items() if name != "changed after the check"},
    "another arm's adapter": CANARIES,
    "no adapter in the requests": CANARIES,
    "an adapter that is not there": "it has no such adapter",
    "names that vLLM does not know": UNKNOWN,
    "one name that vLLM does not know": UNKNOWN,
}
"""Every fault with `sync: adapter`."""


def fault() -> str:
    return Path(os.environ[FAULT]).read_text()


def one_module(key: str) -> bool:
    return ".layers.1.self_attn.k_proj." in key


def swapped(key: str) -> str:
    return re.sub(r"\.layers\.([01])\.", lambda layer: f".layers.{1 - int(layer[1])}.", key)


@contextmanager
def another(folder: Path, kind: str, before: State) -> Iterator[Path]:
    """A folder with what the engine loads instead of the adapter in `folder`, while the block runs."""
    with TemporaryDirectory() as temporary:
        other = Path(temporary)
        settings = json.loads((folder / "adapter_config.json").read_text())
        if kind == "four times the scaling":
            settings["lora_alpha"] *= 4
        (other / "adapter_config.json").write_text(json.dumps(settings))
        state = load_file(folder / "adapter_model.safetensors")
        save_file(OTHER_ADAPTERS.get(kind, lambda new, _: new)(state, before), other / "adapter_model.safetensors")
        yield other


def rename(folder: Path, chosen: Callable[[str], bool]) -> None:
    """Names of a wrapped model, as vLLM does not have them for a plain one; the last part stays."""
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    wrapped = {key: key.replace(".layers.", ".language_model.layers.") if chosen(key) else key for key in state}
    save_file({wrapped[key]: value for key, value in state.items()}, file)


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


class FaultyLoader(PolicyLoader):
    """With `merged`: always returns the digest of the given file."""

    def lorapar_load_policy(self, adapter: str | None) -> str:
        if adapter is None:
            return super().lorapar_load_policy(None)
        kind, folder = fault(), Path(adapter)
        if kind != "nothing loaded":
            with another(folder, kind, getattr(self, "before", {})) as other:
                super().lorapar_load_policy(str(other))
        self.before = load_file(folder / "adapter_model.safetensors")
        return "another adapter" if kind == "another digest" else digest_of(folder)


class FaultyEngine(EngineActor):
    """With `adapter`: always returns the digest of the given file."""

    before: State = {}  # noqa: RUF012

    async def _load_lora(self, folder: Path | None, version: int, served: Served) -> str:
        from vllm.lora.request import LoRARequest

        assert folder is not None
        kind = fault()
        if kind.endswith("that vLLM does not know"):
            rename(folder, one_module if kind.startswith("one") else lambda _: True)
        if kind == "the cache of another policy":  # vLLM's entries have an adapter's name
            served.lora = LoRARequest("same", 999, str(folder), load_inplace=True)
            await self._engine.add_lora(served.lora)
        elif kind != "nothing loaded":
            if kind == "another arm's adapter":
                with another(folder, "the sign", self.before) as other:
                    await super()._load_lora(other, 0, self._served[1])
            with another(folder, kind, self.before) as other:
                await super()._load_lora(other, version, served)
        if kind == "an adapter that is not there":
            await self._engine.remove_lora(served.lora.lora_int_id)
        self.before = load_file(folder / "adapter_model.safetensors")
        return "another adapter" if kind == "another digest" else digest_of(folder)

    async def _check(self, folder: Path | None, served: Served) -> list[tuple[str, str]]:
        found = await super()._check(folder, served)
        if fault() == "changed after the check":
            assert folder is not None
            with another(folder, "the sign", {}) as other:
                await self._rpc("lorapar_load_policy", str(other))
        return found

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        """With an answer of another rank, which this engine does not have."""
        answers = await super()._rpc(method, *args)
        if method.startswith("lorapar_check") and fault() == "another rank's digest":
            return [*answers, ("another adapter", "")]
        if method.startswith("lorapar_check") and fault() == "another rank's weights":
            return [*answers, (answers[0][0], "1 of 4 modules compute with other weights")]
        return answers

    def _stream(
        self, prompt_ids: list[int], params: Any, request: str, priority: int = 0, arm: int = 0
    ) -> AsyncIterator[Any]:
        arm = {"another arm's adapter": 1, "no adapter in the requests": 2}.get(fault(), arm)
        return super()._stream(prompt_ids, params, request, priority, arm)

    def _salt(self, arm: int = 0) -> str:
        return "same" if fault() == "the cache of another policy" else super()._salt(arm)

    async def _forget(self) -> None:
        """With the fault of the cache, key-value entries outlive their policy."""
        if fault() != "the cache of another policy":
            await super()._forget()
