"""Reads back what an engine computes with after an `adapter` load: its LoRA tensors, compared with the file's.

Runs inside vLLM's worker. vLLM keeps the adapters that it can use in slots of stacked tensors: A, and s·B, by module.
Each rank compares the whole slot of an adapter, including that it is zero for modules that the adapter does not have.
It also looks for modules of the adapter that belong to no LoRA layer: vLLM checks only the last part of their names,
and serves the base without those whose path it does not know (`unserved`). The frozen base is not compared; canary
tokens verify it. Neither are LoRA layers that are no plain linear ones (experts, embeddings, heads) and those of
`fully_sharded_loras`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.engines.rounding import Item, beyond, scaled_exactly, worst


@torch.no_grad()
def unlike_in_slot(
    manager: Any, lora_id: int, state: Mapping[str, Tensor], scaling: float
) -> tuple[dict[str, float], int]:
    """Modules whose LoRA tensors are not the adapter's, with how far they are off in bounds of rounding, and how many
    modules were compared.

    Args:
        manager: vLLM's `LoRAModelManager`.
        lora_id: the number, in requests, of an adapter that the manager has.
        state: A [r, in] and B [out, r] by adapter key.
    """
    manager.activate_adapter(lora_id)  # as before each step that uses it; does nothing if it is in a slot
    slot = manager.lora_index_to_id.index(lora_id)
    parts = by_module(state, getattr(manager.model, "hf_to_vllm_mapper", None))
    layers = parts_of_layers(manager)
    items: list[Item] = []
    places: list[str] = []
    for path, names in layers.items():
        layer = manager.modules[path]
        if comparable(layer, names):
            items += (own := _pairs(layer, slot, [parts.get(name) for name in names], scaling))
            places += [path] * len(own)
    found: dict[str, float] = {}
    together = bool(items) and items[0][1][0].device.type != "cpu"
    for path, times in zip(places, worst(items, _off, together=together), strict=True):
        found[path] = max(times, found.get(path, 0.0))
    return {path: times for path, times in found.items() if times > 1}, len(found)


def unserved(manager: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Modules of an adapter that belong to no LoRA layer: the model computes without them.

    Args:
        manager: vLLM's `LoRAModelManager`.
        state: A and B by adapter key.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    asked = by_module(state, getattr(manager.model, "hf_to_vllm_mapper", None))
    layers = parts_of_layers(manager)
    known = {name for names in layers.values() for name in names}
    elsewhere = [path for path, module in manager.model.named_modules() if isinstance(module, PPMissingLayer)]
    # a layer of experts has parts of several layouts below it; layers of another pipeline stage are that rank's
    above = {*elsewhere, *(path for path, names in layers.items() if not comparable(manager.modules[path], names))}
    return sorted(name for name in asked if name not in known and above.isdisjoint(_above(name)))


def not_served(modules: Sequence[str], asked: int) -> str:
    """One clause about an adapter's `unserved` modules, of `asked` in all; empty if there are none."""
    if not modules:
        return ""
    return (
        f"vLLM's model has no LoRA layer for {len(modules)} of the adapter's {asked} modules, for example "
        f"'{modules[0]}'; serve it merged (grpo.sync, evaluate.serve), or adapt other modules"
    )


def parts_of_layers(manager: Any) -> dict[str, Sequence[str]]:
    """By path of each LoRA layer, the names of the adapter's modules that it computes with: several if they are
    packed."""
    return {path: manager.packed_modules.get(path) or [path] for path in manager.modules}


def _above(name: str) -> Iterable[str]:
    """The paths of the modules around a module."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def comparable(layer: Any, names: Sequence[str]) -> bool:
    """Whether a LoRA layer has one pair of whole tensors for each of its parts."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    plain = isinstance(layer, BaseLinearLayerWithLoRA) and not layer.lora_config.fully_sharded_loras
    return plain and layer.n_slices == len(names)


def by_module(state: Mapping[str, Tensor], mapper: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by vLLM's name of the module; `mapper`: vLLM's from checkpoint names to its own."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    renaming = None if mapper is None else mapper.get_rename_mapper()
    return {
        parse_fine_tuned_lora_name(key, renaming)[0]: (down, state[key.replace(".lora_A.", ".lora_B.")])
        for key, down in state.items()
        if ".lora_A." in key
    }


def _pairs(layer: Any, slot: int, parts: Sequence[tuple[Tensor, Tensor] | None], scaling: float) -> list[Item]:
    """The factors, and the matrices in a layer's slot with the adapter's own: A and B of each part."""
    downs: Any = [None if part is None else part[0] for part in parts]
    ups: Any = [None if part is None else part[1] for part in parts]
    if layer.tp_size > 1:
        downs, ups = _of_rank(layer.slice_lora_a, downs), _of_rank(layer.slice_lora_b, ups)
    found: list[Item] = []
    for index, (down, up) in enumerate(zip(downs, ups, strict=True)):
        held_down, held_up = layer.lora_a_stacked[index][slot, 0], layer.lora_b_stacked[index][slot, 0]
        for held, own, factor in ((held_down, down, 1.0), (held_up, up, scaling)):
            found.append((factor, (held, held.new_zeros(0, 0) if own is None else own)))
    return found


def _off(factor: float, held: Tensor, own: Tensor) -> Tensor:
    """How far the worst element of each slot is off."""
    whole = torch.zeros(held.shape, dtype=torch.float64, device=held.device)
    whole[:, : own.shape[1], : own.shape[2]] = own
    return beyond(held, *scaled_exactly(whole, factor, held.dtype))


def _of_rank(cut: Any, parts: list[Tensor | None]) -> list[Tensor | None]:
    """A rank's part of the tensors, as vLLM cuts them: all at once if several lie in one layer."""
    if len(parts) > 1:
        return list(cut(parts))
    return [None if part is None else cut(part) for part in parts]
