"""Learners that share a sequence, compared with one learner that has it alone: peak memory of each and time.

    python jobs/benchmarks/sequence_parallel.py [--quick] [--device cuda] [--shape smollm2-135m|llama2-7b]
        [--ranks 2 4 8] [--lengths 4096 32768] [--checkpointing] --json FILE

A forward and backward pass over one completion after a prompt of 64 tokens, on one machine: a GPU for each rank, or
processes of one thread on a CPU. The peer is the same pass on the first rank, while the others wait; it has no figure
if it does not fit. Random weights. The goal is the peer's memory over the ranks, and 15 % for what is not divided.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _learner import SHAPES, measured, model_of, samples_of
from _rows import Row, print_table, write_rows
from torch.multiprocessing.spawn import spawn

from lorapar_ray.grpo.head import TokenScorer
from lorapar_ray.grpo.memory import checkpoint_layers
from lorapar_ray.grpo.packing import pack, packed_logprobs
from lorapar_ray.grpo.samples import Sample
from lorapar_ray.packed_attention import use_packed_attention
from lorapar_ray.precision import torch_dtype
from lorapar_ray.sequence_parallel import SequenceGroup, sequence_group

PROMPT = 64
LENGTHS = (4096,)
QUICK_LENGTHS = (1024,)
NOT_DIVIDED = 1.15
LIMIT_S = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,024 tokens, once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 3, a divisor of smollm2-135m's 9 heads; else 2")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the completion")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    arguments.ranks = arguments.ranks or [3 if arguments.shape == "smollm2-135m" else 2]
    arguments.lengths = arguments.lengths or (QUICK_LENGTHS if arguments.quick else LENGTHS)
    rows: list[Row] = []
    for ranks in arguments.ranks:
        found = get_context("spawn").SimpleQueue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn(worker, (ranks, port, arguments, found), nprocs=ranks)
        rows += found.get()
        write_rows(arguments.json, rows)
    print(f"{arguments.shape}, {torch_dtype('auto', torch.device(arguments.device))}, {arguments.device}")
    print_table(rows)


def worker(rank: int, ranks: int, port: int, arguments: argparse.Namespace, found: Any) -> None:
    """One rank's part; the first one puts the rows into the queue `found`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_gpu = arguments.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=ranks)
    model = model_of(arguments.shape, device, torch_dtype("auto", device))
    if not use_packed_attention(model.get_base_model()):
        raise RuntimeError("the model has no packed attention")
    if arguments.checkpointing:
        checkpoint_layers(model.get_base_model())
    group, scorer, repeats = sequence_group(ranks, LIMIT_S), TokenScorer(model), 1 if arguments.quick else 3
    rows: list[Row] = []
    for length in arguments.lengths:
        samples = samples_of(PROMPT, length, 1)

        def run(sequence: SequenceGroup | None, samples: list[Sample] = samples) -> Callable[[], None]:
            rows = pack([samples], device, sequence)
            return lambda: packed_logprobs(scorer, rows, temperature=1.0)[0].mean().backward()

        alone: tuple[float, float] | None = None
        if rank == 0:
            try:
                alone = measured(run(None), model, device, repeats)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if "memory" not in str(error):
                    raise
        dist.barrier()
        own = measured(run(group), model, device, repeats)
        every: list[tuple[float, float]] = [own] * ranks
        dist.all_gather_object(every, own)
        rows += compared(f"{length} tokens, {ranks} learners", every, alone)
    if rank == 0:
        found.put(rows)
    dist.destroy_process_group()


def compared(name: str, every: list[tuple[float, float]], alone: tuple[float, float] | None) -> list[Row]:
    """Rows of memory and time of the fullest and the slowest rank."""
    seconds, memory = (max(each[at] for each in every) for at in (0, 1))
    share = NOT_DIVIDED / len(every)
    if alone is None:
        return [
            Row(f"peak memory, {name}", memory, None, "GiB", None, f"≤ {share:.2g}", None),
            Row(f"forward and backward, {name}", seconds, None, "s", None, "–", None),
        ]
    ratio = memory / max(alone[1], 1e-9)
    return [
        Row(f"peak memory, {name}", memory, alone[1], "GiB", ratio, f"≤ {share:.2g}", ratio <= share),
        Row(f"forward and backward, {name}", seconds, alone[0], "s", seconds / alone[0], "–", None),
    ]


if __name__ == "__main__":
    main()
