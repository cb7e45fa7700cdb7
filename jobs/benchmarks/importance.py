"""Importance scoring: examples per second and peak memory against four other ways to the same sums.

    python jobs/benchmarks/importance.py [--quick] [--model MODEL] [--rows FILE] [--device DEVICE] --json FILE

Every way differentiates the same examples and the same loss (mean cross-entropy over an example's response tokens) on
the same model under a float32 rank 8 adapter on QKVGUD:
- plain LoRA: forward and backward of the same padded batches into `.grad`, the floor under any scorer;
- one by one: a backward per example, unpadded, squares summed afterwards, the way of the paper's public script;
- Opacus: per-example gradients of a batch held side by side on every parameter (`pip install opacus`);
- torch.func: `vmap(grad(...))` over the LoRA parameters; eager attention, the only kind that vmap maps here.
The ways take turns within a round and the median round counts, so that a busy machine slows all of them alike. Before
anything is timed the sums must agree. Memory is what a way adds to the model at its peak. Without --model the weights
are random in the shape that --shape names, and without --rows the lengths are drawn like those of GSM8K under
SmolLM2's tokenizer; speed depends on neither weights nor words.
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
from _importance_peers import by_opacus, by_vmap, one_by_one, plain_training
from _memory import device_memory, private_memory
from _rows import Row, print_table, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lorapar_ray.adapters import attach_lora
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.importance import GradSums, TokenizedExample, collate, gradient_sums
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
# Log-normal fits to the first 2000 training questions of GSM8K, chat template and end token included.
PROMPT_TOKENS, RESPONSE_TOKENS = (4.48, 0.23), (4.74, 0.42)
MAX_TOKENS = 512
BATCH = 8
FEW = BATCH // 2
GOAL = 0.85

Way = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and one round: seconds instead of minutes")
    parser.add_argument("--model", help="a directory, hub name or package:NAME instead of random weights")
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m", help="of the random weights")
    parser.add_argument("--rows", type=Path, help="JSON lines with question and answer; needs --model's tokenizer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    arguments = parser.parse_args()
    if arguments.rows and not arguments.model:
        parser.error("--rows needs --model, whose tokenizer reads them")
    examples = read_examples(arguments) if arguments.rows else draw_examples(2 * BATCH)
    base = load(arguments.model, arguments.shape, arguments.quick, arguments.device)
    model = attach_lora(base, rank=8, alpha=64, init="gaussian").eval().to(arguments.device)
    rows = compare(model, examples, rounds=1 if arguments.quick else 5, device=torch.device(arguments.device))
    print_table(rows)
    write_rows(arguments.json, rows)


def compare(model: Any, examples: list[TokenizedExample], rounds: int, device: torch.device) -> list[Row]:
    """Speed and memory beside each peer; torch.func is given fewer examples, since it is the slowest."""
    batches, few = in_batches(examples, device), in_batches(examples[:FEW], device)
    ours, ours_few = partial(gradient_sums, model, batches), partial(gradient_sums, model, few)
    peers: dict[str, Way] = {
        "plain LoRA forward + backward": partial(plain_training, model, batches),
        "one example at a time": partial(one_by_one, model, examples),
    }
    if find_spec("opacus"):
        peers["Opacus"] = partial(by_opacus, model, batches)
    else:
        print("Opacus is not installed and left out; pip install opacus")
    mapped: dict[str, Way] = {"torch.func vmap(grad)": partial(by_vmap, model, few)}
    for name, way in peers.items() | mapped.items():
        if (theirs := way()) is not None:
            agree(name, ours() if name in peers else ours_few(), theirs)
    rows = []
    for own, others, count in ((ours, peers, len(examples)), (ours_few, mapped, FEW)):
        own_speed, *speeds = race([own, *others.values()], count, rounds, device)
        rows += [speed_row(name, own_speed, speed) for name, speed in zip(others, speeds, strict=True)]
        own_peak = peak(own, device)
        rows += [memory_row(name, own_peak, peak(way, device)) for name, way in others.items()]
    return rows


def speed_row(peer: str, ours: list[float], theirs: list[float]) -> Row:
    """Median speeds, and the median of the rounds' own ratios."""
    goal = GOAL if peer.startswith("plain") else 1.0
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    speeds = statistics.median(ours), statistics.median(theirs)
    return Row(f"importance vs {peer}", *speeds, "examples/s", ratio, f"≥ {goal:g}", ratio >= goal)


def memory_row(peer: str, ours: float, theirs: float) -> Row:
    return Row(f"importance vs {peer}: peak memory", ours, theirs, "GiB", ours / theirs, "–", None)


def race(ways: list[Way], examples: int, rounds: int, device: torch.device) -> list[list[float]]:
    """Examples per second of each way in each round, after one round to warm up."""
    speeds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for speed, way in zip(speeds, ways, strict=True):
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                speed.append(examples / (time.perf_counter() - start))
    return speeds


def peak(way: Way, device: torch.device) -> float:
    """GiB that `way` adds at its peak to what is there before it."""
    with (device_memory if device.type == "cuda" else private_memory)() as memory:
        way()
    return memory.added / 2**30


def agree(name: str, ours: Any, theirs: Any) -> None:
    """Stop unless both found the same sums, up to what bfloat16 activations round away."""
    assert isinstance(ours, GradSums) and isinstance(theirs, GradSums)
    for mine, other in ((ours.first, theirs.first), (ours.second, theirs.second)):
        distance = sum(float((value - other[key]).square().sum()) for key, value in mine.items()) ** 0.5
        size = sum(float(value.square().sum()) for value in other.values()) ** 0.5
        if ours.n != theirs.n or not distance <= 0.1 * size:
            raise SystemExit(f"{name} disagrees by {distance / size:.1%} of the sums")


def load(name: str | None, shape: str, quick: bool, device: str) -> Any:
    dtype = torch_dtype("auto", torch.device(device))
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype)
    config = LlamaConfig(**{**SHAPES[shape], **({"num_hidden_layers": 2} if quick else {})})
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def read_examples(arguments: argparse.Namespace) -> list[TokenizedExample]:
    encoder = load_encoder(resolve_model(arguments.model), None)
    lines = arguments.rows.read_text().splitlines()[: 2 * BATCH]
    questions = [(record["question"], record["answer"]) for record in map(json.loads, lines)]
    return [
        TokenizedExample(str(number), *encoder.example(*question, max_length=MAX_TOKENS))
        for number, question in enumerate(questions)
    ]


def draw_examples(count: int) -> list[TokenizedExample]:
    generator = random.Random(0)
    examples = []
    for number in range(count):
        prompt, response = (
            int(generator.lognormvariate(mean, spread)) for mean, spread in (PROMPT_TOKENS, RESPONSE_TOKENS)
        )
        ids = [generator.randrange(3, 32000) for _ in range(min(prompt + response, MAX_TOKENS))]
        examples.append(TokenizedExample(str(number), ids, prompt))
    return examples


def in_batches(examples: list[TokenizedExample], device: torch.device) -> list[dict[str, Tensor]]:
    """Padded batches of equal lengths together, as the scoring stage makes them."""
    ranked = sorted(examples, key=lambda example: len(example.input_ids))
    batches = [collate(ranked[start : start + BATCH], pad_id=0) for start in range(0, len(ranked), BATCH)]
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


if __name__ == "__main__":
    main()
