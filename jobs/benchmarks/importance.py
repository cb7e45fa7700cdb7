"""Importance scoring: examples per second and peak memory, compared with four other methods for the same sums.

    python jobs/benchmarks/importance.py [--quick] [--model MODEL] [--rows FILE] [--device DEVICE] --json FILE

Every method differentiates the same examples and the same loss (mean cross-entropy over an example's response tokens)
on the same model with a float32 rank 8 adapter on QKVGUD:
- plain LoRA: PEFT's forward and backward pass of the same packed tokens into `.grad`, with the same attention: a lower
  bound for scorers that use PEFT's computation;
- one by one: a backward pass per example, squares summed afterwards, as in the paper's public script;
- Opacus: every parameter holds the per-example gradients of a padded batch (`pip install opacus`);
- torch.func: `vmap(grad(...))` over the LoRA parameters; eager attention, the only kind that vmap maps here.
The methods take turns within a round and the median round counts, so that a busy machine slows all of them equally.
Before timing, the sums of a small float32 model of the same family must equal those of autograd one by one; a row
reports the methods' difference in the measured model's dtype. Memory is the peak that a method adds to the model.
Without --model the weights are random, of the shape --shape. Without --rows the lengths are those of 96 training
questions of GSM8K, evenly spread over the set, with SmolLM2's tokenizer and chat template. Speed does not depend on
weights or words.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _gsm8k_lengths import LENGTHS
from _importance_peers import by_opacus, by_vmap, one_by_one, plain_training
from _memory import device_memory, private_memory
from _rows import Row, print_table, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lorapar_ray.adapters import attach_lora
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.importance import GradSums, TokenizedExample, by_cost, collate, gradient_sums, pack
from lorapar_ray.importance.batching import TOKENS
from lorapar_ray.models import resolve_model
from lorapar_ray.precision import torch_dtype

SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
MAX_TOKENS = 512
EXAMPLES = {"cpu": 16, "cuda": len(LENGTHS)}
FEW, FEWEST = 24, 4
"""Number of examples for the slow methods on a GPU, and for torch.func on every device."""
GOALS = {"plain": {"cpu": 0.85, "cuda": 0.85}, "one": {"cpu": 1.0, "cuda": 8.0}}
APART = {"exact": 1e-3, "rounded": 0.1}
"""Largest relative difference of sums: in float32, and with bfloat16 activations."""

Way = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and one round: seconds instead of minutes")
    parser.add_argument("--model", help="a directory, hub name or package:NAME instead of random weights")
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m", help="of the random weights")
    parser.add_argument("--rows", type=Path, help="JSON lines with question and answer; needs --model's tokenizer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    if arguments.rows and not arguments.model:
        parser.error("--rows needs --model, whose tokenizer reads them")
    device = torch.device(arguments.device)
    count = EXAMPLES.get(device.type, EXAMPLES["cuda"])
    examples = read_examples(arguments, count) if arguments.rows else draw_examples(count)
    exact(device)
    base = load(arguments.model, arguments.shape, arguments.quick, arguments.device)
    model = attach_lora(base, rank=8, alpha=64, init="gaussian").eval().to(device)
    rows = compare(model, examples, rounds=3 if arguments.quick else 5, device=device)
    print_table(rows)
    write_rows(arguments.json, rows)


def exact(device: torch.device) -> None:
    """Stop unless a small float32 model's sums on this device equal those of autograd one by one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = attach_lora(AutoModelForCausalLM.from_config(config), rank=8, alpha=64, init="gaussian").eval().to(device)
    examples = draw_examples(6)
    distance = apart(gradient_sums(model, in_batches(examples, device)), one_by_one(model, examples))
    if not distance <= APART["exact"]:
        raise SystemExit(f"the sums of a small float32 model are {distance:.2%} away from autograd's one by one")


def compare(model: Any, examples: list[TokenizedExample], rounds: int, device: torch.device) -> list[Row]:
    """Speed, difference and memory compared with each peer. On a GPU the slow methods get only some of the examples."""
    few = examples if device.type == "cpu" else examples[:: -(-len(examples) // FEW)]
    fewest = examples[:FEWEST]
    batches = in_batches(examples, device)
    peers: dict[str, tuple[Way, list[TokenizedExample]]] = {
        "plain LoRA forward + backward": (partial(plain_training, model, batches), examples),
        "one example at a time": (partial(one_by_one, model, few), few),
    }
    if find_spec("opacus"):
        peers["Opacus"] = (partial(by_opacus, model, padded(few, device)), few)
    else:
        print("Opacus is not installed and left out; pip install opacus")
    mapped: dict[str, tuple[Way, list[TokenizedExample]]] = {
        "torch.func vmap(grad)": (partial(by_vmap, model, padded(fewest, device)), fewest)
    }
    rows = []
    for contest in (peers, mapped):
        for name, (way, given) in list(contest.items()):
            try:
                theirs = way()
            except torch.OutOfMemoryError:
                print(f"{name} does not fit this device and is left out")
                del contest[name]
                continue
            if isinstance(theirs, GradSums):
                distance = apart(gradient_sums(model, in_batches(given, device)), theirs)
                goal = APART["rounded"]
                rows.append(
                    Row(f"importance vs {name}: distance", distance, 0.0, "", None, f"≤ {goal:g}", distance <= goal)
                )
        mine = examples if contest is peers else fewest
        own = partial(gradient_sums, model, in_batches(mine, device))
        ways: list[tuple[Way, int]] = [(own, len(mine)), *((way, len(given)) for way, given in contest.values())]
        own_speed, *speeds = race(ways, rounds, device)
        rows += [speed_row(name, own_speed, speed, device) for name, speed in zip(contest, speeds, strict=True)]
        own_peak = peak(own, device)
        rows += [memory_row(name, own_peak, peak(way, device)) for name, (way, _) in contest.items()]
    tokens = sum(len(example.input_ids) for example in examples)
    per_second = statistics.median(race([(partial(gradient_sums, model, batches), tokens)], 1, device)[0])
    return [*rows, Row("importance: tokens", per_second, None, "tokens/s", None, "–", None)]


def speed_row(peer: str, ours: list[float], theirs: list[float], device: torch.device) -> Row:
    """Median speeds, and the median of the rounds' ratios."""
    goal = GOALS.get(peer.split()[0], {}).get(device.type, 1.0)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    speeds = statistics.median(ours), statistics.median(theirs)
    return Row(f"importance vs {peer}", *speeds, "examples/s", ratio, f"≥ {goal:g}", ratio >= goal)


def memory_row(peer: str, ours: float, theirs: float) -> Row:
    return Row(f"importance vs {peer}: peak memory", ours, theirs, "GiB", ours / theirs, "–", None)


def race(ways: list[tuple[Way, int]], rounds: int, device: torch.device) -> list[list[float]]:
    """Items per second of each method in each round, after a warm-up round; a method comes with its number of items."""
    speeds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for speed, (way, items) in zip(speeds, ways, strict=True):
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                speed.append(items / (time.perf_counter() - start))
    return speeds


def peak(way: Way, device: torch.device) -> float:
    """GiB that `way` adds at its peak."""
    with (device_memory if device.type == "cuda" else private_memory)() as memory:
        way()
    return memory.added / 2**30


def apart(ours: GradSums, theirs: GradSums) -> float:
    """The larger difference of the two kinds of sums, relative to the peer's sums."""
    assert ours.n == theirs.n
    distances = []
    for mine, other in ((ours.first, theirs.first), (ours.second, theirs.second)):
        distance = sum(float((value - other[key]).square().sum()) for key, value in mine.items()) ** 0.5
        distances.append(distance / sum(float(value.square().sum()) for value in other.values()) ** 0.5)
    return max(distances)


def load(name: str | None, shape: str, quick: bool, device: str) -> Any:
    dtype = torch_dtype("auto", torch.device(device))
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype)
    config = LlamaConfig(**{**SHAPES[shape], **({"num_hidden_layers": 2} if quick else {})})
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def read_examples(arguments: argparse.Namespace, count: int) -> list[TokenizedExample]:
    encoder = load_encoder(resolve_model(arguments.model), None)
    lines = arguments.rows.read_text().split("\n")[:count]
    questions = [(record["question"], record["answer"]) for record in map(json.loads, lines)]
    return [
        TokenizedExample(str(number), *encoder.example(*question, max_length=MAX_TOKENS))
        for number, question in enumerate(questions)
    ]


def draw_examples(count: int) -> list[TokenizedExample]:
    """Random tokens with GSM8K's lengths, evenly spread over the recorded ones."""
    generator = random.Random(0)
    lengths = LENGTHS[:: len(LENGTHS) // count][:count]
    return [
        TokenizedExample(str(number), [generator.randrange(3, 32000) for _ in range(prompt + response)], prompt)
        for number, (prompt, response) in enumerate(lengths)
    ]


def in_batches(examples: list[TokenizedExample], device: torch.device) -> list[dict[str, Tensor]]:
    """Packed batches, split by cost as in the scoring stage."""
    lengths = [len(example.input_ids) for example in examples]
    return [pack([examples[index] for index in batch]) for batch in by_cost(lengths, TOKENS[device.type])]


def padded(examples: list[TokenizedExample], device: torch.device) -> list[dict[str, Tensor]]:
    """Padded batches on the device, equal lengths together, for the methods that cannot pack."""
    lengths = [len(example.input_ids) for example in examples]
    cut = by_cost(lengths, TOKENS[device.type], padded=True)
    batches = [collate([examples[index] for index in batch], pad_id=0) for batch in cut]
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


if __name__ == "__main__":
    main()
