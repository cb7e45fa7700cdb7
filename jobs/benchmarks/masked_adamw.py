"""MaskedAdamW: step time and state bytes, compared with torch.optim.AdamW, fused and foreach.

    python jobs/benchmarks/masked_adamw.py [--quick] [--device DEVICE] --json FILE

The parameters are a QKVGUD adapter of Llama-2-7B's shapes at ranks 8 and 64, float32, with 10, 40 and 100 % of the
elements active, drawn at random. The stock optimisers step the whole adapter, as one would without a mask. All of them
take turns within a round, and the median round counts; a separate row includes clipping in the step. On a GPU there are
also rows for the kernels' time alone and for the difference of our bits from torch's. A part that fails is reported in
its row. The state's bytes are those of `state_dict`; our index (4 bytes per active element) has a separate row.

The whole SFT step (forward, backward, clipping, update) is that of a Llama of SmolLM2-135M's shape with a rank 8
adapter, 8 rows of 64 tokens: masked at 40 %, compared with every element under fused AdamW and torch's clipping.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _rows import Row, print_table, write_rows
from torch import nn

from lorapar_ray.adapters import adapter_parameters, attach_lora
from lorapar_ray.optim import MaskedAdamW, masked_adamw, masked_param_groups
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
GOAL: dict[str, dict[float, float | None]] = {
    "cpu": {0.1: 1.0, 0.4: 0.97, 1.0: None},
    "cuda": {0.1: 2.0, 0.4: 1.0, 1.0: None},
}
"""Smallest ratio by device and active share. On a CPU 0.97 counts as no slower: medians differ that much between
runs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rank 8 only, fewer rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    masked_adamw.WORTH_COMPILING = 0  # steps as they are after the first hundreds
    device, rounds = torch.device(arguments.device), 5 if arguments.quick else 15
    rows: list[Row] = []
    parts: list[tuple[str, Callable[[], list[Row]]]] = []
    for rank in (8,) if arguments.quick else (8, 64):
        for share in SHARES:
            parts.append((f"rank {rank}, {share:.0%}", partial(compare, rank, share, rounds, device)))
    if device.type == "cuda":
        parts.append(("bits", partial(bits_apart, device)))
    parts.append(("whole step", lambda: [whole_step(6 if arguments.quick else 16, device)]))
    for name, part in parts:
        try:
            rows += part()
        except Exception as error:
            traceback.print_exc()
            rows.append(Row(f"{name}: failed, {type(error).__name__}", 0.0, None, "–", None, "–", False))
        write_rows(arguments.json, rows)
    print_table(rows)


def bits_apart(device: torch.device) -> list[Row]:
    """Differences from fused AdamW's values after steps from the same state.

    The unit is the last place of the larger of the values before and after the step: if the step cancels a value, the
    result has finer places than its operands. Torch's CUDA kernel rounds β and the bias corrections to float32, ours
    does not (see `triton_step`): they were 418 last places apart on an H100.
    """
    generator = torch.Generator(device).manual_seed(1)
    start = [torch.randn(shape, generator=generator, device=device) for shape in list(shapes(8))[:24]]
    masks = [torch.rand(value.shape, generator=generator, device=device) < 0.4 for value in start]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    masked = MaskedAdamW([{"params": ours, "masks": masks}], lr=0.01, weight_decay=0.1)
    stock = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, fused=True)
    most, different, total, kept = 0.0, 0, 0, True
    for _ in range(5):
        before = [other.detach().clone() for other in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn(mine.shape, generator=generator, device=device)
        masked.step()
        stock.step()
        for mine, other, mask, old, first in zip(ours, theirs, masks, before, start, strict=True):
            a, b = mine.detach()[mask], other.detach()[mask]
            most = max(most, float(((a - b).abs() / last_place(torch.maximum(b.abs(), old[mask].abs()))).max()))
            different += int((a != b).sum())
            total += a.numel()
            kept &= torch.equal(mine[~mask], first[~mask])
            with torch.no_grad():
                mine[mask] = other[mask]
            for name in ("exp_avg", "exp_avg_sq"):
                masked.state[mine][name].copy_(stock.state[other][name][mask])
    return [
        Row("bits: a step's values apart, at most", most, None, "last places", None, "≤ 1", most <= 1),
        Row("bits: share of values that differ", different / total, None, "–", None, "–", None),
        Row("bits: inactive values kept", float(kept), None, "–", None, "1", kept),
    ]


def last_place(values: torch.Tensor) -> torch.Tensor:
    """The distance from each positive float32 value to the next."""
    return torch.nextafter(values, torch.full_like(values, torch.inf)) - values


def whole_step(rounds: int, device: torch.device) -> Row:
    """One SFT step, masked and unmasked in turns, on the same model and batch."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2), dtype=torch_dtype("auto", device)).to(device)
    model = attach_lora(base, rank=8, alpha=16, init="gaussian")
    parameters = adapter_parameters(model)
    masks = {key: torch.rand(value.shape, device=device) < 0.4 for key, value in parameters.items()}
    ours = MaskedAdamW(masked_param_groups(parameters, masks, lr=1e-6, weight_decay=0.01))
    peer = torch.optim.AdamW(parameters.values(), lr=1e-6, weight_decay=0.01, fused=True)
    ids = torch.randint(SMOLLM2["vocab_size"], (8, 64), device=device)

    def step(optimizer: Any, update: Callable[[], Any]) -> float:
        synchronize(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        update()
        synchronize(device)
        return (time.perf_counter() - start) * 1e3

    def torchs() -> None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        peer.step()

    pairs = [(step(ours, lambda: ours.clip_and_step(1.0)), step(peer, torchs)) for _ in range(rounds + 1)][1:]
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
    updates = [ours.step, *(peer.step for peer in peers.values())]
    times = race(updates, rounds, device)
    what = f"Llama-2-7B adapter, rank {rank}, {share:.0%} active"
    rows = [
        step_row(f"{what}: step vs {name}", share, times[0], other, device)
        for name, other in zip(peers, times[1:], strict=True)
    ]

    def torchs() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1e6)
        peers["fused"].step()

    clipped = race([lambda: ours.clip_and_step(1e6), torchs], rounds, device)
    rows.append(step_row(f"{what}: clip and step vs fused", share, clipped[0], clipped[1], device))
    if device.type == "cuda":
        mine, other = (device_milliseconds(update) for update in updates[:2])
        rows.append(Row(f"{what}: kernels alone", mine, other, "ms", other / mine, "–", None))
    full = state_bytes(peers["fused"])
    own, active = ours.state_bytes(), sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    ratio = own["moments"] / full
    rows.append(
        Row(f"{what}: moments", own["moments"] / 2**20, full / 2**20, "MiB", ratio, "active share", ratio <= active)
    )
    rows.append(Row(f"{what}: index", own["index"] / 2**20, 0.0, "MiB", None, "–", None))
    return rows


def step_row(name: str, share: float, ours: list[float], theirs: list[float], device: torch.device) -> Row:
    """Median milliseconds of a step; the ratio is the peer's time divided by ours."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    goal = GOAL[device.type][share]
    met = None if goal is None else ratio >= goal
    return Row(name, statistics.median(ours), statistics.median(theirs), "ms", ratio, _said(goal), met)


def _said(goal: float | None) -> str:
    return "–" if goal is None else f"≥ {goal:g}"


def race(updates: Sequence[Callable[[], Any]], rounds: int, device: torch.device) -> list[list[float]]:
    """Milliseconds of each optimiser's step in each round, taking turns, after two rounds to warm up.

    On a GPU a round is ten steps, from an idle device to an idle device: the time that a training loop waits, for
    launches or kernels.
    """
    steps = 10 if device.type == "cuda" else 1
    times: list[list[float]] = [[] for _ in updates]
    for number in range(rounds + 2):
        for taken, update in zip(times, updates, strict=True):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                update()
            synchronize(device)
            if number > 1:
                taken.append((time.perf_counter() - start) * 1e3 / steps)
    return times


def device_milliseconds(update: Callable[[], Any]) -> float:
    """Time of a step's kernels on the GPU, without launches and gaps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            update()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in profiler.key_averages())) / 5 / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments, without step counters on both sides."""
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
