"""Measures on the device how many tokens fit into one forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lorapar_ray.engines.settings import OUTSIDE_TORCH

PROBE_TOKENS = 64
SHARE = 0.5
"""Share of the free memory for stored activations; the rest is for kernels and gradients."""
KEPT_LAYERS = 40.0
"""Activations of a decoder layer without checkpointing, in units of its input (a Llama in bfloat16: 30 to 32)."""
CPU_SHARE = 0.25
"""The same on a host, whose memory engines and workers share."""
MOST_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Above this size a larger pass is not faster."""


def pass_limits(
    model: Any, rows: Any, longest: int, *, share: float, checkpointing: bool | None, logits: bool = False
) -> tuple[int, bool]:
    """(tokens of one pass, whether to checkpoint) for `model`.

    Args:
        rows: the model's inputs for `PROBE_TOKENS` tokens in one row.
        longest: tokens of the longest sample; a pass must hold at least one.
        share: this process's part of its device.
        checkpointing: as the config says; None: where the longest sample does not fit otherwise.
        logits: the whole vocabulary's logits of every token are stored, with their gradient.
    """
    device = next(iter(model.parameters())).device
    room = free_memory(device, share)
    head = 2.0 * model.config.get_text_config().vocab_size * model.dtype.itemsize if logits else 0.0
    kept = kept_bytes_per_token(model, rows)
    if checkpointing is None:
        checkpointing = longest * (kept + head) > room
    if checkpointing:
        kept = checkpointed_bytes_per_token(model, kept)
    kept += head
    return max(longest, min(MOST_TOKENS.get(device.type, MOST_TOKENS["cuda"]), int(room / kept))), checkpointing


def free_memory(device: torch.device, share: float) -> float:
    """Bytes for stored activations."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return SHARE * room_on_gpu(free, total, torch.cuda.memory_reserved(device), share)
    import psutil

    return CPU_SHARE * share * float(psutil.virtual_memory().available)


def room_on_gpu(free: int, total: int, reserved: int, share: float) -> float:
    """Bytes that a process may still allocate: those left of its part, whatever others have allocated so far; they
    start at the same time.

    Args:
        free: bytes of the GPU that nobody has allocated.
        total: its bytes.
        reserved: bytes that this process holds in torch's allocator.
        share: its part of the GPU.
    """
    return max(0.0, min(float(free), share * total - reserved - OUTSIDE_TORCH))


def kept_bytes_per_token(model: Any, inputs: dict[str, Any]) -> float:
    """Bytes that a forward pass stores for the backward pass, per token, without weights.

    Measured, except where the weights are sharded: there gathered weights look like activations.
    """
    if any(isinstance(value, DTensor) for value in model.parameters()):
        return KEPT_LAYERS * layer_bytes_per_token(model)
    with saved_bytes(model) as kept:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return sum(kept.values()) / inputs["input_ids"].numel()


def checkpointed_bytes_per_token(model: Any, kept: float) -> float:
    """The same with checkpointing: each layer's input, and all that one layer stores while it is recomputed.

    Args:
        kept: bytes without it.
    """
    return layer_bytes_per_token(model) + kept / float(model.config.get_text_config().num_hidden_layers)


def layer_bytes_per_token(model: Any) -> float:
    """Bytes of every layer's input."""
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    return float(config.num_hidden_layers * config.hidden_size * size)


@contextmanager
def saved_bytes(model: Any) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd saves inside this context, by its number; without the model's weights."""
    own = {value.untyped_storage()._cdata for value in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def checkpoint_layers(model: Any) -> None:
    """Recompute each layer's activations in the backward pass; dropout stays off.

    transformers checkpoints layers in training mode only. The flag is set on the layers alone: what is inside them
    stays in evaluation mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
