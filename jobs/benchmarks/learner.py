"""The learner's forward and backward pass, compared with a plain one over the same tokens: time and peak memory.

    python jobs/benchmarks/learner.py [--quick] [--device cuda] [--shape smollm2-135m|llama2-7b] [--layers N]
        [--group N] --json FILE

One group of 8 completions of 256, 2,048 or 8,192 tokens, after a prompt of 64 or 1,024 tokens. On a CPU time is that of
one thread's processor, so that other work on the machine changes it little. The peer is a plain
trainer at its best: each sample separately with its prompt, no padding, torch's causal kernel, the model's head, and
`log_softmax` over the vocabulary for one sample; the same frozen base, LoRA and dtype. It computes all logits of a
sample at once, so it has no figure if they do not fit. Both checkpoint where the learner does. Random weights: speed
and memory do not depend on them.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _learner import SHAPES, measured, model_of, samples_of
from _rows import Row, print_table, write_rows

from lorapar_ray.grpo.head import TokenScorer
from lorapar_ray.grpo.memory import PROBE_TOKENS, checkpoint_layers, pass_limits
from lorapar_ray.grpo.packing import micro_batches, pack, packed_logprobs
from lorapar_ray.grpo.samples import Sample
from lorapar_ray.packed_attention import use_packed_attention
from lorapar_ray.precision import torch_dtype

PROMPTS = 64, 1024
LENGTHS = 256, 2048, 8192
GROUP = 8
GOAL = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 and 2,048 tokens, once each; on a CPU 2 × 256")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="decoder layers instead of the shape's")
    parser.add_argument("--group", type=int, default=GROUP, help="completions")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch_dtype("auto", device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = model_of(arguments.shape, device, dtype, arguments.layers)
    lengths: tuple[int, ...] = LENGTHS
    group = arguments.group
    if arguments.quick:
        lengths, group = (LENGTHS[:2], group) if device.type == "cuda" else (LENGTHS[:1], 2)
    rows: list[Row] = []
    for length, prompt in product(lengths, PROMPTS):
        rows += compare(model, prompt, length, group, device, repeats=1 if arguments.quick else 3)
        write_rows(arguments.json, rows)
    print(f"{arguments.shape}, {dtype}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    print_table(rows)


def compare(model: Any, prompt: int, length: int, group: int, device: torch.device, repeats: int) -> list[Row]:
    """Rows of time and of memory for one group."""
    samples = samples_of(prompt, length, group)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    base = model.get_base_model()
    probe = pack([samples_of(PROBE_TOKENS, 1, 1)], device)
    tokens, checkpointed = pass_limits(model, probe_inputs(probe), prompt + length, share=1.0, checkpointing=None)
    base.gradient_checkpointing_disable()
    if checkpointed:
        checkpoint_layers(base)

    def plain() -> None:
        for sample in samples:
            plain_pass(model, sample, device)

    def ours() -> None:
        scorer = TokenScorer(model)
        for micro in micro_batches([samples], tokens):
            packed_logprobs(scorer, pack(micro, device), temperature=1.0)[0].mean().backward()

    if not use_packed_attention(base):
        raise RuntimeError("the model has no packed attention")
    our_time, our_memory = measured(ours, model, device, repeats, clock)
    base.set_attn_implementation("sdpa")
    their_time: float | None
    their_memory: float | None
    try:
        their_time, their_memory = measured(plain, model, device, repeats, clock)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        their_time = their_memory = None
    name = f"{group} × {length} tokens behind {prompt}{', checkpointed' if checkpointed else ''}"
    time_ratio = None if their_time is None else our_time / their_time
    goal = f"≤ {GOAL:g}"
    met = None if time_ratio is None else time_ratio <= GOAL
    memory_ratio = None if their_memory is None else our_memory / max(their_memory, 1e-9)
    return [
        Row(f"forward and backward, {name}", our_time, their_time, "s", time_ratio, goal, met),
        Row(f"peak memory, {name}", our_memory, their_memory, "GiB", memory_ratio, "–", None),
    ]


def probe_inputs(probe: Any) -> dict[str, Any]:
    """The probe in a form for any attention."""
    return {"input_ids": probe.inputs["input_ids"]}


def plain_pass(model: Any, sample: Sample, device: torch.device) -> None:
    ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]], device=device)
    keep = len(sample.token_ids) + 1
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, :-1].float()
    logits.log_softmax(-1).gather(-1, ids[0, -keep + 1 :, None]).mean().backward()


if __name__ == "__main__":
    main()
