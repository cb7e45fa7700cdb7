"""A learner's model, samples, and the measurement of a pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _memory import Memory, device_memory, private_memory
from transformers import AutoModelForCausalLM, LlamaConfig

from lorapar_ray.adapters import attach_lora
from lorapar_ray.grpo.samples import Sample
from lorapar_ray.precision import use_tensor_cores

SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}


def model_of(shape: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    torch.manual_seed(0)
    use_tensor_cores(device, dtype)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=16384)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return attach_lora(base, rank=8, alpha=16, init="gaussian").eval()


def samples_of(prompt: int, length: int, count: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)

    def ids(size: int) -> list[int]:
        found: list[int] = torch.randint(10, 30000, (size,), generator=draw).tolist()
        return found

    shared = ids(prompt)
    return [Sample(shared, ids(length), [-1.0] * length, 1.0, finished=True, version=0) for _ in range(count)]


def measured(
    work: Callable[[], None],
    model: Any,
    device: torch.device,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """(median seconds of the clock, peak GiB in addition to the memory before)."""
    work()  # warm-up
    seconds: list[float] = []
    memory: Memory
    with device_memory() if device.type == "cuda" else private_memory() as memory:
        for _ in range(repeats):
            model.zero_grad()
            synchronise(device)
            start = clock()
            work()
            synchronise(device)
            seconds.append(clock() - start)
    return statistics.median(seconds), memory.added / 2**30


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
