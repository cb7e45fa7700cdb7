"""Loads weights into a vLLM model that already serves.

On a GPU linear weights have the checkpoint's layout, so new ones are copied into the existing tensors: CUDA graphs
captured those, so they use the new weights. On a CPU, and with quantisation, vLLM repacks weights for its kernels.
There its layerwise reload converts only the given modules back to the checkpoint's layout, loads and repacks them. (For
a whole model it would warn about each module without new weights, which is intended here.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Weights = Iterator[tuple[str, Tensor]]


def has_checkpoint_layout(model: Any, device: torch.device) -> bool:
    """Whether each weight can be written in place: on a GPU, without quantisation or derived weights (MLA, MoE)."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    def plain(module: Any) -> bool:
        method = getattr(module, "quant_method", None)
        known = isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)
        if is_deferred_attention_layer(module):
            return not hasattr(module, "kv_b_proj")
        return known or not isinstance(method, QuantizeMethodBase)

    return device.type == "cuda" and all(plain(module) for module in model.modules())


def load_in_place(model: Any, weights: Weights, *, whole: bool) -> None:
    """Copy weights into the tensors that the model computes with.

    Args:
        whole: no rank holds only a part; then the sent weights are compared with the model's, bit for bit except for
            their order.

    Raises:
        ValueError: they differ.
    """
    sent: list[Tensor] = []

    def counted() -> Weights:
        for name, tensor in weights:
            sent.append(bit_sums(tensor))
            yield name, tensor

    loaded = model.load_weights(counted() if whole else weights)
    if whole and sent:
        held = torch.stack([bit_sums(model.get_parameter(name)) for name in sorted(loaded)])
        if not torch.equal(torch.stack(sent).sum(0), held.sum(0)):
            raise ValueError("the engine's weights are not those of the policy after it was loaded")


def bit_sums(tensor: Tensor) -> Tensor:
    """[2]: sums of a tensor's bit patterns and of their squares, modulo 2⁶⁴, on its device; those of parts add up."""
    bits = tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).long()
    return torch.stack([bits.sum(), (bits * bits).sum()])


def modules_of(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """The model's modules that hold weights of these checkpoint names, by their path; see `paths_of`."""
    return {path: model.get_submodule(path) for path in paths_of(model, names).values()}


def paths_of(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The path of the model's module that holds each of these weights, by checkpoint name.

    Raises:
        ValueError: a name has no module: vLLM uses another name for it, or does not run it.
    """
    stacked = getattr(model, "packed_modules_mapping", {})
    packed = {part: whole for whole, parts in stacked.items() for part in parts}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    known = dict(model.named_modules())
    found: dict[str, str] = {}
    for name in sorted(names):
        module = name.rpartition(".")[0]
        path, _, last = module.rpartition(".")
        mapped = None if mapper is None else mapper._map_name(name)
        candidates = [module, f"{path}.{packed.get(last, last)}", "" if mapped is None else mapped.rpartition(".")[0]]
        place = next((each for each in candidates if each and each in known), None)
        if place is None:
            raise ValueError(f"vLLM's model has no module for '{name}'; set grpo.sync: adapter")
        found[name] = place
    return found


def reload_modules(model: Any, modules: Mapping[str, Any], weights: Weights, config: Any) -> None:
    """Convert `modules` back to the checkpoint's layout, load all of their weights, and let vLLM repack them.

    Raises:
        ValueError: a module did not get all of its weights.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for module in modules.values():
        initialize_layerwise_reload(module)
    try:
        model.load_weights(weights)
        short = [path for path, module in modules.items() if _lacks_weights(get_layerwise_info(module))]
    finally:
        for module in modules.values():
            finalize_layerwise_reload(module, config)
    if short:
        raise ValueError(f"{len(short)} modules of the engine did not get their weights, for example {short[0]}")


def _lacks_weights(info: Any) -> bool:
    """Whether a module under reload still waits for elements of its `weight` (a bias stays as it is)."""
    if not info.can_load():
        return False  # complete, and processed already
    parameters, _ = info.restore_metadata
    return bool(info.load_numel < parameters["weight"].numel())


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
