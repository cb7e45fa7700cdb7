"""Stage 1's training step compared with TRL's SFTTrainer and a plain PEFT loop.

    python jobs/benchmarks/sft_step.py [--quick] [--device DEVICE] [--part 135m] [--part 1b] [--part 7b] --json FILE

`135m` is a Llama of SmolLM2-135M's shape, 16 rows a step in micro-batches of 8, 20 to 60 tokens a row of which the last
3 to 8 have a loss: stage 1's loop with `acceleration: auto`, compared with `SFTTrainer` with torch's fused AdamW over
every element. On a GPU launches take most of such a model's step.

`1b` and `7b` are Llama-3.2-1B's (vocabulary 32,000) and Llama-2-7B's shapes in bfloat16 with random weights, 32 rows a
step in micro-batches of 4, of the lengths of GSM8K's questions and answers: the loop's passes and optimiser, compared
with forward, backward, `clip_grad_norm_` and fused AdamW of the same PEFT model, whose micro-batches are padded to
their longest row and no further. First uncompiled, then with the same compiled layers. They need a GPU.

Adapters are of rank 8 on QKVGUD in float32, with 40 % of the elements active in ours. A part that fails is reported in
its row; the others continue.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _gsm8k_lengths import LENGTHS
from _rows import Row, print_table, write_rows
from _shapes import SHAPES

from lorapar_ray.adapters import adapter_parameters, attach_lora
from lorapar_ray.config import SftConfig
from lorapar_ray.optim import MaskedAdamW, masked_param_groups
from lorapar_ray.precision import torch_dtype
from lorapar_ray.sft.arm import Worker
from lorapar_ray.sft.batches import plan_batches
from lorapar_ray.sft.loop import TrainingLoop
from lorapar_ray.sft.passes import EagerPasses, GraphPasses, Passes, compile_layers
from lorapar_ray.sft.rows import Rows, collate, losses_in
from lorapar_ray.sft.step_log import StepLog

PARTS = ("135m", "1b", "7b")
ROWS, MICRO = 16, 8
LARGE_ROWS, LARGE_MICRO = 32, 4
ACTIVE = 0.4
RATE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps; no compiled 7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all that the device can run")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # for both sides: the adapters' float32 products
    rows: list[Row] = []
    for part in arguments.part or (["135m", "7b", "1b"] if device.type == "cuda" else ["135m"]):
        start = time.monotonic()
        try:
            found = small(arguments.quick, device) if part == "135m" else large(part, arguments.quick, device)
            rows += found
        except Exception as error:
            traceback.print_exc()
            rows.append(Row(f"{part}: failed, {type(error).__name__}", 0.0, None, "–", None, "–", False))
        write_rows(arguments.json, rows)
        print_table(rows)  # after each part: a time limit may end the run during the next
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)


def model_of(part: str, device: torch.device) -> Any:
    """A PEFT model with random weights in the device's dtype, the same in each call."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with device:
        base = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[part]), dtype=torch_dtype("auto", device))
    model = attach_lora(base, rank=8, alpha=16, init="gaussian").to(device)
    model.train()
    return model


def masked_optimizer(parameters: dict[str, Any]) -> MaskedAdamW:
    generator = torch.Generator().manual_seed(0)
    masks = {key: torch.rand(value.shape, generator=generator) < ACTIVE for key, value in parameters.items()}
    return MaskedAdamW(masked_param_groups(parameters, masks, lr=RATE, weight_decay=0.01), lr=RATE)


def small(quick: bool, device: torch.device) -> list[Row]:
    """Seconds of a step of the 135M shape, ours and TRL's, and the difference of their losses."""
    steps = (6 if quick else 12) if device.type == "cpu" else (20 if quick else 80)
    examples = short_examples(ROWS * steps)
    ours, losses = our_steps(examples, steps, device)
    print(f"135m: ours {ours:.4f} s a step", flush=True)
    try:
        theirs, their_losses = trl_steps(examples, steps, device)
    except Exception as error:
        traceback.print_exc()
        print(f"TRL's side failed: {error}")
        return [Row("135m: step, TRL failed", ours, None, "s", None, "–", None)]
    tokens = sum(len(each["input_ids"]) for each in examples) / steps
    goal = 1.0 if device.type == "cpu" else 5.0
    name = f"135m, {ROWS} rows: step vs SFTTrainer"
    gap = max(abs(a - b) / b for a, b in zip(losses[:5], their_losses[:5], strict=True))
    return [
        Row(name, ours, theirs, "s", theirs / ours, f"≥ {goal:g}", theirs / ours >= goal),
        Row("135m: tokens", tokens / ours, tokens / theirs, "tokens/s", theirs / ours, "–", None),
        Row("135m: losses of 5 steps apart, at most", gap, None, "relative", None, "≤ 0.02", gap <= 0.02),
    ]


def short_examples(count: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 61, (count,), generator=draw).tolist()
    answers = torch.randint(3, 9, (count,), generator=draw).tolist()
    ids = [torch.randint(3, SHAPES["135m"]["vocab_size"], (length,), generator=draw).tolist() for length in lengths]
    return [
        {"input_ids": tokens, "response_start": len(tokens) - answer}
        for tokens, answer in zip(ids, answers, strict=True)
    ]


def settings_of(steps: int) -> SftConfig:
    return SftConfig(
        batch_size=ROWS, micro_batch_size=MICRO, max_steps=steps, learning_rate=RATE, max_length=160, weight_decay=0.01
    )


def our_steps(examples: list[dict[str, Any]], steps: int, device: torch.device) -> tuple[float, list[float]]:
    """(median seconds of a step, losses) of our loop, without the first steps, which capture graphs."""
    import json

    settings = settings_of(steps)
    model = model_of("135m", device)
    parameters = adapter_parameters(model)
    make: Callable[..., Passes] = GraphPasses if device.type == "cuda" else EagerPasses
    passes = make(model, list(parameters.values()), device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sft.jsonl"
        TrainingLoop(
            model,
            masked_optimizer(parameters),
            passes,
            settings=settings,
            plan=plan_batches([len(each["input_ids"]) for each in examples], settings, 1, seed=0),
            examples=examples,
            validation=[],
            filler=0,
            worker=Worker(0, 1, device),
            checkpoints=None,
            log=StepLog(file, None, ACTIVE),
        ).run(None)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    if isinstance(passes, GraphPasses):
        print(f"135m: {passes.captured} graphs, capturing went {'well' if passes.capturing else 'wrong'}")
        print("135m: seconds of each step:", " ".join(f"{line['seconds']:.3f}" for line in lines))
    return steady([line["seconds"] for line in lines]), [line["loss"] for line in lines]


def trl_steps(examples: list[dict[str, Any]], steps: int, device: torch.device) -> tuple[float, list[float]]:
    """(median seconds of a step, losses) of TRL's trainer on the same rows in the same order."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig as TrlConfig
    from trl import SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            self.ends.append(time.perf_counter())

    settings = settings_of(steps)
    plan = plan_batches([len(each["input_ids"]) for each in examples], settings, 1, seed=0)
    table = [
        {
            "input_ids": example["input_ids"],
            "labels": [-100] * example["response_start"] + example["input_ids"][example["response_start"] :],
        }
        for (number,) in plan.rows
        for example in [examples[number]]
    ]
    model, clock = model_of("135m", device), Clock()
    words = {f"w{number}": number for number in range(SHAPES["135m"]["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrlConfig(
            output_dir=folder,
            per_device_train_batch_size=plan.micro_batch,
            gradient_accumulation_steps=plan.accumulation,
            train_sampling_strategy="sequential",
            max_steps=plan.steps,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_ratio,
            weight_decay=0.01,
            optim="adamw_torch_fused",
            max_length=160,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(table),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return steady([b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]), losses


def steady(seconds: list[float]) -> float:
    """The median of the second half."""
    return statistics.median(seconds[len(seconds) // 2 :])


def large(part: str, quick: bool, device: torch.device) -> list[Row]:
    """Milliseconds of a step of a large shape, ours and plain PEFT's, uncompiled and with the same compiled layers."""
    model = model_of(part, device)
    parameters = adapter_parameters(model)
    micros = real_rows(SHAPES[part]["vocab_size"])
    found = []
    for how in ("uncompiled", "compiled layers"):
        if how != "uncompiled":
            if quick and part == "7b":
                continue
            compile_layers(model)
        rounds = 5 if quick else 15
        theirs = plain_steps(model, parameters, micros, rounds, device)
        ours = passes_steps(model, parameters, micros, rounds, device)
        ratio = theirs / ours
        tokens = sum(len(example["input_ids"]) for micro in micros for (example,) in micro)
        name = f"{part}, {LARGE_ROWS} rows of GSM8K ({tokens} tokens), {how}: step vs plain PEFT"
        found.append(Row(name, ours, theirs, "ms", ratio, "≥ 0.9", ratio >= 0.9))
        print(found[-1], flush=True)
    return found


Micros = list[list[list[dict[str, Any]]]]


def real_rows(vocabulary: int) -> Micros:
    """A step's micro-batches of one example a row, as stage 1 lays them out."""
    draw = torch.Generator().manual_seed(0)
    every = LENGTHS[:: len(LENGTHS) // LARGE_ROWS][:LARGE_ROWS]
    examples = [
        {
            "input_ids": torch.randint(3, vocabulary, (prompt + answer,), generator=draw).tolist(),
            "response_start": prompt,
        }
        for prompt, answer in every
    ]
    settings = SftConfig(batch_size=LARGE_ROWS, micro_batch_size=LARGE_MICRO, max_steps=1)
    plan = plan_batches([len(each["input_ids"]) for each in examples], settings, 1, seed=0)
    rows = [[examples[each] for each in row] for row in plan.rows]
    return [rows[start : start + LARGE_MICRO] for start in range(0, len(rows), LARGE_MICRO)]


def passes_steps(
    model: Any,
    parameters: dict[str, Any],
    micros: Micros,
    rounds: int,
    device: torch.device,
    make: Callable[..., Any] = GraphPasses,
) -> float:
    """Milliseconds of our step."""
    passes = make(model, list(parameters.values()), device)
    optimizer = masked_optimizer(parameters)
    laid = [collate(micro, packed=False, filler=0, buckets=passes.buckets) for micro in micros]
    losses = losses_in([example for micro in micros for row in micro for example in row])
    filled, real = (sum(each.input_ids.numel() for each in kind) for kind in (laid, plain_rows(micros)))
    print(f"buckets: {filled / real:.3f} of the tokens of plain padding, {len({each.shape for each in laid})} shapes")

    def step() -> None:
        passes.begin(losses)
        for rows in laid:
            passes.add(rows)
        optimizer.clip_and_step(1.0, only_finite=True)

    taken = milliseconds(step, rounds, device)
    if isinstance(passes, GraphPasses):
        print(f"{passes.captured} graphs, capturing went {'well' if passes.capturing else 'wrong'}", flush=True)
    for parameter in parameters.values():
        parameter.grad = None
    return taken


def plain_rows(micros: Micros) -> list[Rows]:
    """Padded to the longest row of each."""
    return [collate(micro, packed=False, filler=0) for micro in micros]


def plain_steps(model: Any, parameters: dict[str, Any], micros: Micros, rounds: int, device: torch.device) -> float:
    """Milliseconds of a plain step with PEFT and torch."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.01, fused=True)
    batches = []
    for rows in plain_rows(micros):
        labels = torch.full_like(rows.input_ids, -100)
        labels.view(-1)[rows.places + 1] = rows.targets
        batches.append((rows.input_ids.to(device), labels.to(device)))
    losses = sum(int((labels != -100).sum()) for _, labels in batches)

    def step() -> None:
        optimizer.zero_grad()
        for ids, labels in batches:
            model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=losses).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()

    taken = milliseconds(step, rounds, device)
    optimizer.zero_grad()
    return taken


def milliseconds(step: Callable[[], None], rounds: int, device: torch.device) -> float:
    """Median over rounds of one step each, started on an idle device, after two warm-up rounds."""
    for _ in range(2):
        step()
    taken = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
