"""MaskedAdamW: step time and state bytes against torch.optim.AdamW, fused and foreach.

    python jobs/benchmarks/masked_adamw.py [--quick] [--device DEVICE] --json FILE

The parameters are a QKVGUD adapter of Llama-2-7B's shapes at ranks 8 and 64, float32, with 10, 40 and 100 % of the
elements active, drawn at random. The stock optimisers step the whole adapter: they are what one would use without a
mask. All of them take turns within a round, and the median round counts. The state's bytes are what `state_dict` would
hold; our index (4 bytes an active element) is counted in a row of its own.

The whole SFT step (forward, backward, clipping, update) is that of a Llama of SmolLM2-135M's shape with a rank 8
adapter, 8 rows of 64 tokens: masked at 40 % against every element under fused AdamW and torch's own clipping.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _rows import Row, print_table, write_rows
from torch import nn

from lorapar_ray.adapters import adapter_parameters, attach_lora
from lorapar_ray.optim import MaskedAdamW, masked_param_groups
from lorapar_ray.precision import torch_dtype

LAYERS, HIDDEN, INTERMEDIATE = 32, 4096, 11008
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SHARES = (0.1, 0.4, 1.0)
GOAL = {0.1: "> 1", 0.4: "≥ 1", 1.0: "–"}
SAME = 0.97
"""Ratios from here on count as no slower: medians of the same step differ by so much from run to run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rank 8 only, fewer rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    arguments = parser.parse_args()
    rows = []
    for rank in (8,) if arguments.quick else (8, 64):
        for share in SHARES:
            rows += compare(rank, share, 5 if arguments.quick else 15, torch.device(arguments.device))
    rows.append(whole_step(6 if arguments.quick else 16, torch.device(arguments.device)))
    print_table(rows)
    write_rows(arguments.json, rows)


def whole_step(rounds: int, device: torch.device) -> Row:
    """One SFT step, masked against unmasked on the same model and batch, taking turns."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2), dtype=torch_dtype("auto", device)).to(device)
    model = attach_lora(base, rank=8, alpha=16, init="gaussian")
    parameters = adapter_parameters(model)
    masks = {key: torch.rand(value.shape, device=device) < 0.4 for key, value in parameters.items()}
    ours = MaskedAdamW(masked_param_groups(parameters, masks, lr=1e-6, weight_decay=0.01))
    peer = torch.optim.AdamW(parameters.values(), lr=1e-6, weight_decay=0.01, fused=True)
    ids = torch.randint(SMOLLM2["vocab_size"], (8, 64), device=device)

    def step(optimizer: Any, clip: Callable[[], Any]) -> float:
        synchronize(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        clip()
        optimizer.step()
        synchronize(device)
        return (time.perf_counter() - start) * 1e3

    clips = (lambda: ours.clip_grad_norm_(1.0), lambda: torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0))
    pairs = [(step(ours, clips[0]), step(peer, clips[1])) for _ in range(rounds + 1)][1:]
    mine, others = [a for a, _ in pairs], [b for _, b in pairs]
    ratio = statistics.median(b / a for a, b in pairs)
    name = "SFT step, 135M Llama, 40% active vs unmasked fused"
    return Row(name, statistics.median(mine), statistics.median(others), "ms", ratio, "≥ 0.98", ratio >= 0.98)


def compare(rank: int, share: float, rounds: int, device: torch.device) -> list[Row]:
    generator = torch.Generator(device).manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in shapes(rank)]
    masks = [torch.rand(p.shape, generator=generator, device=device) < share for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
    ours = MaskedAdamW([{"params": parameters, "masks": masks}])
    peers = {
        "fused": torch.optim.AdamW(parameters, fused=True),
        "foreach": torch.optim.AdamW(parameters, foreach=True),
    }
    times = race([ours, *peers.values()], rounds, device)
    what = f"Llama-2-7B adapter, rank {rank}, {share:.0%} active"
    rows = [
        step_row(f"{what}: step vs {name}", share, times[0], other)
        for name, other in zip(peers, times[1:], strict=True)
    ]
    full = state_bytes(peers["fused"])
    own, active = ours.state_bytes(), sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    ratio = own["moments"] / full
    rows.append(
        Row(f"{what}: moments", own["moments"] / 2**20, full / 2**20, "MiB", ratio, "active share", ratio <= active)
    )
    rows.append(Row(f"{what}: index", own["index"] / 2**20, 0.0, "MiB", None, "–", None))
    return rows


def step_row(name: str, share: float, ours: list[float], theirs: list[float]) -> Row:
    """Median milliseconds of a step; the ratio is the peer's time over ours."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    met = None if share == 1 else ratio > 1 if share < 0.4 else ratio >= SAME
    return Row(name, statistics.median(ours), statistics.median(theirs), "ms", ratio, GOAL[share], met)


def race(optimizers: list[torch.optim.Optimizer], rounds: int, device: torch.device) -> list[list[float]]:
    """Milliseconds of each optimiser's step in each round, after one round to warm up."""
    times: list[list[float]] = [[] for _ in optimizers]
    for number in range(rounds + 1):
        for taken, optimizer in zip(times, optimizers, strict=True):
            synchronize(device)
            start = time.perf_counter()
            optimizer.step()
            synchronize(device)
            if number:
                taken.append((time.perf_counter() - start) * 1e3)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments; the step counters are left out on both sides."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq")
    )


def shapes(rank: int) -> Iterator[tuple[int, int]]:
    """A and B of Q, K, V, gate, up and down in every layer."""
    attention, up, down = (HIDDEN, HIDDEN), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)
    for _ in range(LAYERS):
        for inputs, outputs in (attention, attention, attention, up, up, down):
            yield rank, inputs
            yield outputs, rank


if __name__ == "__main__":
    main()
