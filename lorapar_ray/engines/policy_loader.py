"""Runs inside vLLM's worker process: swaps the served policy for base + s·BA between two engine steps.

Each policy is computed in float32 from the base's own weights and rounded once, to the dtype the engine computes in;
never by adding to the loaded weights. So after any number of updates the served weights differ from base + s·BA by only
one rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from lorapar_ray.adapters.merge import lora_scaling, merged_weights
from lorapar_ray.cpu.engine import lighten
from lorapar_ray.engines.base_weights import BaseWeights, KeptWeights, kept_on
from lorapar_ray.engines.served_adapter import not_served, unlike_in_slot, unserved
from lorapar_ray.engines.served_weights import complaint, part_of, unlike
from lorapar_ray.engines.weight_loading import (
    Weights,
    has_checkpoint_layout,
    load_in_place,
    modules_of,
    paths_of,
    reload_modules,
    with_stacked,
)
from lorapar_ray.mergeable import base_name, missing_from, not_in_the_files
from lorapar_ray.transfer import on_device

State = tuple[str, Mapping[str, Tensor]]
"""SHA-256 of an adapter's file, and its tensors on the device."""
NO_STATE: State = ("", {})


class PolicyLoader:
    """A vLLM worker extension: its methods are mixed into the worker and called by `collective_rpc`."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    device: Any

    _lorapar_touched: set[str]
    """Names of the weights that the current policy has changed."""
    _lorapar_tried: set[str]
    """Names of the weights that were read back before any policy changed them."""
    _lorapar_unread: set[str]
    """Those of them that cannot be read back."""
    _lorapar_state: State
    """The adapter that was loaded, until it has been compared."""

    def lorapar_prepare(self) -> None:
        """Called when the engine has started, before anything else here; does nothing the second time."""
        from vllm.platforms import current_platform

        if hasattr(self, "_lorapar_touched"):
            return
        self._lorapar_touched, self._lorapar_tried, self._lorapar_unread = set(), set(), set()
        self._lorapar_state = NO_STATE
        leave_the_head_alone(self.model_runner.model)
        if current_platform.is_cpu():
            lighten(self.model_runner)

    def lorapar_alive(self) -> None:
        """Heartbeat."""

    def lorapar_load_policy(self, adapter: str | None) -> str:
        """Serve base + adapter, or the base alone for None.

        Args:
            adapter: directory with `adapter_model.safetensors` and `adapter_config.json`.

        Returns:
            SHA-256 of the adapter file that was read, or `base`; the sender compares it with what it sent.

        Raises:
            ValueError: the base's files lack adapted weights, or a module did not load its weights.
        """
        before, self._lorapar_state = self._lorapar_touched, NO_STATE
        if adapter is None:
            if before:
                base, dtype = self._lorapar_base(before), self.model_config.dtype
                self._lorapar_load(before, ((name, base[name].to(dtype)) for name in sorted(before)))
            return "base"
        state, scaling, digest = read_adapter(Path(adapter), self.device)

        adapted = {base_name(key) for key in state}
        names = with_stacked(adapted | before, getattr(self.model_runner.model, "packed_modules_mapping", {}))
        base = self._lorapar_base(names)
        if missing := missing_from(base, state):
            raise ValueError(not_in_the_files(missing, str(self.model_config.model)))
        touched, dtype = names & base.keys(), self.model_config.dtype
        self._lorapar_try(touched)

        def weights() -> Weights:
            yield from merged_weights(base, state, scaling=scaling, dtype=dtype)
            for name in sorted(touched - adapted):
                yield name, base[name].to(dtype)

        self._lorapar_load(touched, weights())
        self._lorapar_touched, self._lorapar_state = touched, (digest, state)
        return digest

    def lorapar_check_merged(self, adapter: str | None) -> tuple[str, str]:
        """Whether the model computes with base + adapter; independent of what `lorapar_load_policy` did, except that
        a file with the same bytes is not copied to the device again.

        Args:
            adapter: as there.

        Returns:
            SHA-256 of the adapter file that was compared, or `base`; and a clause that says which modules compute with
            other weights, empty if none.
        """
        state: Mapping[str, Tensor] = {}
        scaling, digest = 1.0, "base"
        if adapter is not None:
            state, scaling, digest = read_adapter(Path(adapter), self.device, self._lorapar_state)
        self._lorapar_state = NO_STATE
        names = {base_name(key) for key in state} | self._lorapar_touched
        paths = paths_of(self.model_runner.model, names - self._lorapar_unread)
        model, dtype = self.model_runner.model, self.model_config.dtype
        off = unlike(model, paths, self._lorapar_base(paths), state, scaling, digest, dtype)
        return digest, complaint(off, len(paths))

    def lorapar_check_adapter(self, lora_id: int, adapter: str) -> tuple[str, str]:
        """As `lorapar_check_merged`, for vLLM's adapter number `lora_id` and `sync: adapter`."""
        state, scaling, digest = read_adapter(Path(adapter), self.device)
        manager = self.model_runner.lora_manager._adapter_manager
        if lora_id not in manager.list_adapters():
            return digest, "it has no such adapter"
        if unknown := not_served(unserved(manager, state), len(state) // 2):
            return digest, unknown
        off, compared = unlike_in_slot(manager, lora_id, state, scaling)
        return digest, complaint(off, compared)

    def _lorapar_try(self, names: set[str]) -> None:
        """Read weights back before a policy changes them: those that are not the base's cannot be read."""
        if new := names - self._lorapar_tried:
            model, dtype = self.model_runner.model, self.model_config.dtype
            paths = {name: path for name, path in paths_of(model, new).items() if part_of(model, path, name)}
            off = unlike(model, paths, self._lorapar_base(new), {}, 1.0, "base", dtype)
            self._lorapar_unread |= new - paths.keys() | off.keys()
            self._lorapar_tried |= new

    def _lorapar_base(self, names: Iterable[str]) -> BaseWeights | KeptWeights:
        """The base's tensors, on the device that merges."""
        if not hasattr(self, "_lorapar_weights"):
            files = BaseWeights(Path(self.model_config.model))
            on_gpu = self.device.type == "cuda"
            self._lorapar_weights: BaseWeights | KeptWeights = files
            if on_gpu:
                part = self.vllm_config.cache_config.gpu_memory_utilization
                ranks = self.vllm_config.parallel_config.world_size
                self._lorapar_weights = kept_on(files, set(names) & files.keys(), self.device, part, ranks)
        return self._lorapar_weights

    @torch.no_grad()
    def _lorapar_load(self, names: Iterable[str], weights: Weights) -> None:
        """Load weights of these names, whole stacked tensors, into the model."""
        from vllm.config import set_current_vllm_config

        model = self.model_runner.model
        with set_current_vllm_config(self.vllm_config):
            if has_checkpoint_layout(model, self.device):
                load_in_place(model, weights, whole=self.vllm_config.parallel_config.world_size == 1)
            else:
                reload_modules(model, modules_of(model, names), weights, self.model_config)


def read_adapter(
    folder: Path, device: torch.device, known: State = NO_STATE
) -> tuple[Mapping[str, Tensor], float, str]:
    """(A and B by adapter key, on the device; their scaling; SHA-256 of the file) of an adapter directory.

    Args:
        known: the tensors of a file with that digest are on the device already.
    """
    blob = (folder / "adapter_model.safetensors").read_bytes()
    digest = hashlib.sha256(blob).hexdigest()
    state = known[1] if digest == known[0] else {key: on_device(each, device) for key, each in load(blob).items()}
    return state, lora_scaling(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))), digest


def leave_the_head_alone(model: Any) -> None:
    """Remove the LoRA that vLLM (`adapter`) wraps around every output head; our adapters adapt no head.

    It applies the adapters of the sampled rows to a prompt's tokens: prompt log-probabilities fail if another request
    is in the same step.
    """
    processor = getattr(model, "logits_processor", None)
    plain = getattr(processor, "base_layer", None)
    if processor is None or plain is None:
        return

    def logits(hidden: torch.Tensor, head: Any, *others: Any, **named: Any) -> Any:
        return plain._get_logits(hidden, getattr(head, "base_layer", head), *others, **named)

    processor._get_logits = logits
