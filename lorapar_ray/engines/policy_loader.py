"""Runs inside vLLM's worker process: swaps the served policy for base + s·BA between two engine steps.

vLLM repacks linear weights for its kernels, so they cannot be edited in place; `reload_weights` takes them in
checkpoint form. Each policy is computed in float32 from the base's own file, never by adding to what is loaded: a
hundred updates later the served weights are still exactly one rounding away from base + s·BA.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorapar_ray.adapters.merge import base_name, lora_scaling, merged_weights
from lorapar_ray.engines.cpu import lighten


class PolicyLoader:
    """A vLLM worker extension: its methods are mixed into the worker and called by `collective_rpc`."""

    model_runner: Any
    model_config: Any

    def lorapar_prepare(self) -> None:
        """Called once when the engine has started."""
        from vllm.platforms import current_platform

        leave_the_head_alone(self.model_runner.model)
        if current_platform.is_cpu():
            lighten(self.model_runner)

    def lorapar_load_policy(self, adapter: str | None) -> str:
        """Serve base + adapter, or the bare base for None.

        Args:
            adapter: directory with `adapter_model.safetensors` and `adapter_config.json`.

        Returns:
            SHA-256 of the adapter file that was read, or `base`; the sender compares it with what it sent.
        """
        base = BaseWeights(Path(self.model_config.model))
        before: set[str] = getattr(self, "_lorapar_touched", set())
        if adapter is None:
            self._lorapar_reload((name, base[name]) for name in sorted(before))
            return "base"
        blob = (Path(adapter) / "adapter_model.safetensors").read_bytes()
        state = load_file(Path(adapter) / "adapter_model.safetensors")
        scaling = lora_scaling(json.loads((Path(adapter) / "adapter_config.json").read_text()))

        adapted = {base_name(key) for key in state}
        stacked = getattr(self.model_runner.model, "packed_modules_mapping", {})
        touched = with_stacked(adapted | before, stacked) & base.keys()

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            yield from merged_weights(base, state, scaling=scaling)
            for name in sorted(touched - adapted):
                yield name, base[name]

        self._lorapar_reload(weights())
        self._lorapar_touched = touched
        return hashlib.sha256(blob).hexdigest()

    def _lorapar_reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.model_runner.reload_weights(weights_iterator=weights)


def leave_the_head_alone(model: Any) -> None:
    """Take off the LoRA that vLLM (`adapter`) puts around every output head; ours adapt no head.

    It takes the adapters of the rows that are sampled for those of a prompt's tokens: prompt log-probabilities fail as
    soon as another request is in the same step.
    """
    processor = getattr(model, "logits_processor", None)
    plain = getattr(processor, "base_layer", None)
    if processor is None or plain is None:
        return

    def logits(hidden: torch.Tensor, head: Any, *others: Any, **named: Any) -> Any:
        return plain._get_logits(hidden, getattr(head, "base_layer", head), *others, **named)

    processor._get_logits = logits


def with_stacked(names: Iterable[str], stacked: Mapping[str, Sequence[str]]) -> set[str]:
    """`names` and the weights that vLLM keeps in one tensor with them: it loads such a tensor whole or leaves holes.

    Args:
        names: checkpoint names, such as `model.layers.0.self_attn.q_proj.weight`.
        stacked: vLLM's `packed_modules_mapping`, such as `qkv_proj` to `q_proj`, `k_proj` and `v_proj`.
    """
    parts_of = {part: parts for parts in stacked.values() for part in parts}
    found = set(names)
    for name in names:
        module, _, kind = name.rpartition(".")
        path, _, part = module.rpartition(".")
        found |= {f"{path}.{other}.{kind}" for other in parts_of.get(part, ())}
    return found


class BaseWeights(Mapping[str, torch.Tensor]):
    """The base model's tensors by checkpoint name, read from its memory-mapped files when asked for."""

    def __init__(self, model: Path) -> None:
        folder = model if model.is_dir() else _hub_snapshot(str(model))
        self._files = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _hub_snapshot(name: str) -> Path:
    """Where the hub client keeps a model that vLLM has already downloaded."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.safetensors", "*.json"]))
