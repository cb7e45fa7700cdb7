"""Several arms on one frozen base, compared with the same arms one after the other, in both stages.

    python jobs/benchmarks/arms.py [--quick] [--device DEVICE] [--shape 135m|1b|1.5b] [--arms K] [--stage N] --json FILE

Stage 1: K arms (each with its own mask of 40 %, seed and learning rate) of rank 8 on QKVGUD, 16 rows a step (8 with
`--quick`) of 20 to 60 tokens, of which the last 3 to 8 have a loss; the base has random weights. Both sides run stage
1's loop, passes and optimiser like `lorapar`: `TrainingLoop` for each arm, `ArmsLoop` for all. Starting workers and
loading the model, which the arms share too, do not count.

- arms per hour: K × the median step alone / the median step together, in the device's dtype;
- processor time of an arm's step: on a CPU this hardly depends on other work on the machine;
- losses: in float32, the largest relative difference of a step's loss from that of the arm alone;
- launches: operations of a forward and backward pass that compute something (no views), for each arm's step. Their
  number does not depend on the device, their cost does: on a CPU each computes for long, so fewer and larger products
  gain little; on a GPU launches take most of a small model's step;
- memory: the peak memory that one more arm adds, and its parts: adapter with gradients, and optimiser.

Stage 2: SmolLM2-135M with K adapters of rank 8 and K learning rates, as `lorapar ablate` runs it: one learner, and one
vLLM engine that serves all policies as LoRA adapters; alone, on a CPU, an engine merges its run's policy. A step's work
is that of `grpo.py`. Arms per hour count everything from the start of the processes to the written adapter. Two of the
arms run alone; their mean stands for all. tests/e2e/test_grpo_together.py compares the results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _memory import device_memory, private_memory
from _rows import Row, print_table, write_rows
from _shapes import SHAPES
from torch.utils._python_dispatch import TorchDispatchMode

from lorapar_ray.adapters import adapter_parameters, attach_lora
from lorapar_ray.adapters.many import ManyAdapters
from lorapar_ray.config import SftConfig
from lorapar_ray.optim import MaskedAdamW, masked_param_groups
from lorapar_ray.precision import torch_dtype
from lorapar_ray.sft.arm import Arm, Worker
from lorapar_ray.sft.arms_loop import ArmsLoop
from lorapar_ray.sft.batches import plan_batches
from lorapar_ray.sft.loop import TrainingLoop
from lorapar_ray.sft.loss import arm_losses
from lorapar_ray.sft.passes import EagerPasses, GraphPasses
from lorapar_ray.sft.rows import collate
from lorapar_ray.sft.step_log import StepLog

MICRO, ACTIVE, RATE = 8, 0.4, 1e-4
GOAL = 2.5
"""Ratio of arms per hour, for 4 arms."""
MIB = 2**20


class Bench:
    """A shape on a device, and the arms on it."""

    def __init__(self, shape: str, device: torch.device, arms: int, rows: int) -> None:
        self.shape, self.device, self.arms, self.rows = shape, device, arms, rows
        self.worker = Worker(0, 1, device)
        draw = torch.Generator().manual_seed(1)
        size, count = SHAPES[shape]["vocab_size"], rows * 8
        lengths = torch.randint(20, 61, (count,), generator=draw).tolist()
        answers = torch.randint(3, 9, (count,), generator=draw).tolist()
        self.examples = [
            {"input_ids": torch.randint(3, size, (n,), generator=draw).tolist(), "response_start": n - answer}
            for n, answer in zip(lengths, answers, strict=True)
        ]
        empty = attach_lora(self.empty(torch.float32), rank=8, alpha=16)
        self.sizes = {key: value.shape for key, value in adapter_parameters(empty).items()}
        self.bases: dict[torch.dtype, Any] = {}
        self.processor_s = 0.0
        """Processor seconds of the last run's steps."""

    def settings(self, arm: int, steps: int) -> SftConfig:
        rate = RATE * (1 + arm)
        return SftConfig(
            batch_size=self.rows, micro_batch_size=MICRO, max_steps=steps, learning_rate=rate, max_length=160
        )

    def empty(self, dtype: torch.dtype) -> Any:
        """The base without weights."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[self.shape]), dtype=dtype)

    def base(self, dtype: torch.dtype) -> Any:
        """A copy of the base; its weights are drawn once."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        if dtype not in self.bases:
            torch.manual_seed(0)
            with self.device:
                self.bases = {dtype: AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[self.shape]), dtype=dtype)}
        return deepcopy(self.bases[dtype])

    def state(self, arm: int) -> dict[str, torch.Tensor]:
        """The adapter that an arm starts from."""
        draw = torch.Generator().manual_seed(arm)
        return {key: 0.01 * torch.randn(size, generator=draw) for key, size in self.sizes.items()}

    def peft(self, arm: int, dtype: torch.dtype) -> Any:
        model = attach_lora(self.base(dtype), rank=8, alpha=16).to(self.device)
        state = self.state(arm)
        for key, parameter in adapter_parameters(model).items():
            parameter.data.copy_(state[key])
        return model

    def many(self, arms: int, dtype: torch.dtype) -> ManyAdapters:
        states = [self.state(arm) for arm in range(arms)]
        return ManyAdapters(self.base(dtype), states, [2.0] * arms, dropout=0.0, device=self.device)

    def optimizer(self, arm: int, parameters: dict[str, Any]) -> MaskedAdamW:
        draw = torch.Generator().manual_seed(arm)
        masks = {key: torch.rand(value.shape, generator=draw) < ACTIVE for key, value in parameters.items()}
        rate = RATE * (1 + arm)
        return MaskedAdamW(masked_param_groups(parameters, masks, lr=rate, weight_decay=0.01), lr=rate)

    def parts(self, arm: int, folder: Path, steps: int) -> dict[str, Any]:
        settings = self.settings(arm, steps)
        return {
            "settings": settings,
            "plan": plan_batches([len(each["input_ids"]) for each in self.examples], settings, 1, seed=arm),
            "examples": self.examples,
            "worker": self.worker,
            "checkpoints": None,
            "log": StepLog(folder / f"{arm}.jsonl", None, ACTIVE),
        }

    def passes(self, model: Any, parameters: Sequence[Any], arms: int | None = None) -> Any:
        kind = GraphPasses if self.device.type == "cuda" else EagerPasses
        return kind(model, parameters, self.device, arms)

    def run(self, steps: Callable[[], None]) -> None:
        start = time.process_time()
        steps()
        self.processor_s = time.process_time() - start

    def alone(self, arm: int, dtype: torch.dtype, steps: int) -> list[dict[str, Any]]:
        """The log's lines of one arm."""
        model = self.peft(arm, dtype)
        parameters = adapter_parameters(model)
        with tempfile.TemporaryDirectory() as folder:
            loop = TrainingLoop(
                model, self.optimizer(arm, parameters), self.passes(model, list(parameters.values())),
                validation=[], filler=0, **self.parts(arm, Path(folder), steps),
            )  # fmt: skip
            self.run(lambda: loop.run(None))
            return lines_of(Path(folder) / f"{arm}.jsonl")

    def together(self, arms: int, dtype: torch.dtype, steps: int) -> tuple[list[list[dict[str, Any]]], int]:
        """(the log's lines of each arm, bytes of one arm's optimiser)."""
        model = self.many(arms, dtype)
        passes = self.passes(model, model.stacks(), arms)
        model.share_gradients()
        with tempfile.TemporaryDirectory() as folder:
            made = [
                Arm(
                    model.named_parameters_of(arm), self.optimizer(arm, model.parameters_of(arm)), validates=False,
                    **self.parts(arm, Path(folder), steps),
                )
                for arm in range(arms)
            ]  # fmt: skip
            loop = ArmsLoop(
                model, made, passes, validation=[()] * arms, packed=False, filler=0, worker=self.worker
            )  # fmt: skip
            self.run(lambda: loop.run([None] * arms))
            held = sum(made[0].optimizer.state_bytes().values())
            return [lines_of(Path(folder) / f"{arm}.jsonl") for arm in range(arms)], held


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def steady(lines: Sequence[dict[str, Any]]) -> float:
    """Median seconds of a step, without the first two, which capture graphs."""
    return statistics.median(line["seconds"] for line in lines[2:])


def speed(bench: Bench, dtype: torch.dtype, steps: int) -> list[Row]:
    arms = bench.arms
    before = steady(bench.alone(0, dtype, steps))
    spent = bench.processor_s / steps
    ours = steady(bench.together(arms, dtype, steps)[0][0])
    spent_together = bench.processor_s / steps / arms
    after = steady(bench.alone(arms - 1, dtype, steps))
    alone = (before + after) / 2
    print(f"alone {before:.3f} and {after:.3f} s a step; {arms} together {ours:.3f}", flush=True)
    ratio = arms * alone / ours
    goal, met = (f"≥ {GOAL:g}", ratio >= GOAL) if arms == 4 else ("–", None)
    name = f"{bench.shape}, {arms} arms: arm-steps per hour"
    rows = [Row(name, 3600 / ours * arms, 3600 / alone, "1/h", ratio, goal, met)]
    name = f"{bench.shape}, {arms} arms: processor time of an arm's step"
    rows.append(Row(name, spent_together, spent, "s", spent / spent_together, "–", None))
    return rows


def equality(bench: Bench, steps: int) -> Row:
    together = bench.together(bench.arms, torch.float32, steps)[0]
    gap = 0.0
    for arm, mine in enumerate(together):
        for line, other in zip(mine, bench.alone(arm, torch.float32, steps), strict=True):
            gap = max(gap, abs(line["loss"] - other["loss"]) / other["loss"])
    name = f"{bench.shape}, {bench.arms} arms, float32: losses of {steps} steps apart from alone, at most"
    return Row(name, gap, None, "relative", None, "≤ 1e-05", gap <= 1e-5)


class Launches(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function._schema.returns
        self.count += not any(each.alias_info is not None and not each.alias_info.is_write for each in results)
        return function(*args, **(kwargs or {}))


def launches(bench: Bench, arms: int, dtype: torch.dtype) -> int:
    """Launches of one forward and backward pass over a micro-batch of each arm, on meta tensors."""
    meta = torch.device("meta")
    if arms > 1:
        states = [{key: torch.empty(size, device=meta) for key, size in bench.sizes.items()}] * arms
        model: Any = ManyAdapters(bench.empty(dtype), states, [2.0] * arms, dropout=0.0, device=meta)
    else:
        model = attach_lora(bench.empty(dtype), rank=8, alpha=16)
    rows = collate([[each] for each in bench.examples[:2]] * arms, packed=False, filler=0, arms=arms)
    parts: dict[str, Any] = {name: part.to(meta) for name, part in vars(rows).items() if torch.is_tensor(part)}
    for _ in range(2):  # the second time, gradients exist
        with Launches() as counted:
            arm_losses(model.train(), replace(rows, **parts)).sum().backward()
    return counted.count


def memory(bench: Bench, dtype: torch.dtype) -> list[Row]:
    peaks, held = [], 0
    bench.base(dtype)
    for arms in (1, bench.arms):
        with device_memory() if bench.device.type == "cuda" else private_memory() as seen:
            _, held = bench.together(arms, dtype, 2)
        peaks.append(seen.added)
    adapter = sum(each.nbytes for each in bench.state(0).values())
    further = (peaks[1] - peaks[0]) / (bench.arms - 1) / MIB
    return [
        Row(f"{bench.shape}: memory of a further arm", further, peaks[0] / MIB, "MiB, MiB with 1", None, "–", None),
        Row(f"{bench.shape}: of that its adapter and gradients", 2 * adapter / MIB, None, "MiB", None, "–", None),
        Row(f"{bench.shape}: of that its optimiser", held / MIB, None, "MiB", None, "–", None),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and steps, and stage 2 only if it is named")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=("135m", "1b", "1.5b"), default="135m")
    parser.add_argument("--arms", type=int, default=4)
    parser.add_argument("--stage", type=int, choices=(1, 2), help="only this one")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # losses are compared
    dtype = torch_dtype("auto", device)
    rows: list[Row] = []
    if arguments.stage != 2:
        for found in stage1_rows(arguments, device, dtype):
            rows += found
            write_rows(arguments.json, rows)
            print_table(rows)
    if arguments.stage == 2 or (arguments.stage is None and not arguments.quick):
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        from _arms_stage2 import stage2_rows

        rows += stage2_rows(
            arguments.arms, device.type, 3 if arguments.quick else 8, GOAL, alone=1 if arguments.quick else 2
        )
        write_rows(arguments.json, rows)
        print_table(rows)


def stage1_rows(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[list[Row]]:
    """Stage 1, part by part."""
    bench = Bench(arguments.shape, device, arguments.arms, 8 if arguments.quick else 16)
    steps = (6 if arguments.quick else 12) if device.type == "cpu" else 40
    one, several = launches(bench, 1, dtype), launches(bench, bench.arms, dtype)
    name = f"{bench.shape}, {bench.arms} arms: launches of a pass for each arm"
    yield [Row(name, several / bench.arms, float(one), "", one * bench.arms / several, "–", None)]
    yield speed(bench, dtype, steps)
    yield memory(bench, dtype)
    yield [equality(bench, 2 if arguments.quick else 6)]


if __name__ == "__main__":
    main()
