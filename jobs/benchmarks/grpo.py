"""Stage 2 compared with TRL's GRPOTrainer, and its rollout engine compared with vLLM alone.

    python jobs/benchmarks/grpo.py [--quick] [--device cuda] [--model MODEL] --json FILE

Samples per second: our stage 2 as users run it (Ray, vLLM engine, Ray Train learner, policy verified at every step) and
TRL's trainer, on a CPU with transformers' generation (its only way there), on a GPU with colocated vLLM: same model and
dtype, same rank 8 adapter on QKVGUD, same prompts, 8 prompts × 8 completions of 48 tokens a step (32 × 8 of 256 on a
GPU), strictly on-policy. The reward is overlap with a sentence, so that nearly every group has different rewards and
both sides learn from it. Start-up and the first step are left out on both sides; mean lengths are printed, since
samples differ in length. TRL's `AsyncGRPOTrainer` is not compared: it attends with FlashAttention 3's kernels only, so
it does not run on a CPU. Tokens per second: the engine inside its Ray actor, with stage 2's requests, compared with
`vllm.LLM` with the same settings and seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _rows import Row, print_table, write_rows
from _stage2_run import GROUP, RATE, SIZES, Size, prepare

from lorapar_ray.adapters.job import make_adapter
from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.settings import engine_arguments, engine_environment, platform_arguments
from lorapar_ray.grpo.job import train_stage2
from lorapar_ray.models import resolve_model
from lorapar_ray.runs import RunDirectory
from lorapar_ray.session import ray_session


def main() -> None:
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 steps of each instead of 8")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--eager", action="store_true", help="engines without CUDA graphs, which take time to capture")
    parser.add_argument("--model", default="package:smollm2-135m-instruct")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    steps = 3 if arguments.quick else 8
    size = SIZES[arguments.device]
    if arguments.eager:
        size = replace(size, engine={**size.engine, "enforce_eager": True})
    rows: list[Row] = []

    def found(*more: Row) -> None:  # printed now: a time limit may end the run before the rest
        rows.extend(more)
        print_table(list(more))
        write_rows(arguments.json, rows)

    with TemporaryDirectory() as folder:
        config, run = prepare(arguments.model, steps + 1, Path(folder) / "run", size)
        with ray_session():
            make_adapter(config, run, run.adapter)
            shutil.copytree(run.adapter, run.sft / "adapter")
            questions = read_table(run.labels)
            ours, our_length = stage2(config, run, size)
        theirs, their_length = apart(trl, config, str(run.adapter), questions, steps, size)
        found(
            Row("GRPO vs TRL", ours, theirs, "samples/s", ours / theirs, "≥ 2", ours >= 2 * theirs),
            Row("mean completion length", our_length, their_length, "tokens", our_length / their_length, "–", None),
        )
        with ray_session():
            speed = engine_tokens(config, size)
        [peer] = apart(vllm_alone, config, size)
        found(
            Row("rollout engine vs vLLM alone", speed, peer, "tokens/s", speed / peer, "≥ 0.95", speed >= 0.95 * peer)
        )


def stage2(config: Config, run: RunDirectory, size: Size) -> tuple[float, float]:
    """(samples per second of a step, mean completion length)."""
    train_stage2(config, run)
    lines = [json.loads(line) for line in (run.metrics / "grpo.jsonl").read_text().splitlines()][1:]
    return size.samples / median(lines, "seconds"), median(lines, "completion_length")


def median(lines: list[dict[str, Any]], key: str) -> float:
    return statistics.median(line[key] for line in lines)


def engine_tokens(config: Config, size: Size) -> float:
    """Tokens per second of the engine in its actor."""
    import ray

    settings, model = config.grpo, resolve_model(config.model.path)
    engine = start_engine(model, settings.rollout_engine, settings.rollout_resources, seed=0)
    ray.get(engine.start.remote())
    sampling = {"n": GROUP, "temperature": 1.0, "max_tokens": size.tokens, "seed": 0, "ignore_eos": True}
    speeds = []
    for _ in range(4):
        start = time.perf_counter()
        ray.get([engine.generate.remote([prompt], sampling) for prompt in token_prompts(size)])
        speeds.append(size.samples * size.tokens / (time.perf_counter() - start))
    ray.kill(engine)
    return statistics.median(speeds[1:])


def token_prompts(size: Size) -> list[list[int]]:
    return [[5 + 17 * place % 4000 + number for place in range(48)] for number in range(size.prompts)]


def apart(work: Any, *arguments: Any) -> tuple[float, ...]:
    """`work` in a separate process, so that libraries do not share memory or threads."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, work, *arguments))
    process.start()
    theirs.close()
    try:
        result: tuple[float, ...] = ours.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__} ended without a result") from None
    process.join()
    return result


def _send(pipe: Any, work: Any, *arguments: Any) -> None:
    pipe.send(work(*arguments))
    pipe.close()
    os._exit(0)  # an engine's threads may abort a normal exit; the result is already written


def vllm_alone(config: Config, size: Size) -> tuple[float, ...]:
    """Tokens per second of `vllm.LLM` with the engine's settings."""
    settings = config.grpo
    os.environ |= engine_environment(settings.rollout_engine, settings.rollout_resources)
    from vllm import LLM, SamplingParams

    model = resolve_model(config.model.path)
    arguments = engine_arguments(model, settings.rollout_engine, seed=0, trust_remote_code=False)
    llm = LLM(**{**platform_arguments(), **arguments})
    params = SamplingParams(n=GROUP, temperature=1.0, max_tokens=size.tokens, seed=0, ignore_eos=True, logprobs=0)
    speeds = []
    for _ in range(4):
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids in token_prompts(size)], params, use_tqdm=False)
        speeds.append(size.samples * size.tokens / (time.perf_counter() - start))
    return (statistics.median(speeds[1:]),)


def trl(config: Config, adapter: str, questions: list[dict[str, Any]], steps: int, size: Size) -> tuple[float, ...]:
    """(samples per second of a step, mean completion length) of TRL's trainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lorapar_ray.adapters import load_adapter
    from lorapar_ray.grpo.rewards import get_reward
    from lorapar_ray.student import load_base

    torch.set_num_threads(config.grpo.learner_resources.compute_threads)
    on_gpu = config.grpo.learner_resources.gpu_count > 0
    device = torch.device("cuda" if on_gpu else "cpu")
    colocated = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.9 * config.grpo.rollout_resources.gpu_count,
        "vllm_max_model_length": size.engine["max_model_len"],
    }
    marks: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])

    model = resolve_model(config.model.path)
    chats = [{"prompt": [{"role": "user", "content": q["prompt"]}], "response": q["response"]} for q in questions]
    with TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=load_adapter(load_base(config.model, model, on=device), Path(adapter)),
            reward_funcs=[get_reward("reference_overlap")],
            train_dataset=Dataset.from_list(chats),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=size.trl_batch,
                gradient_accumulation_steps=size.samples // size.trl_batch,
                num_generations=GROUP,
                max_completion_length=size.tokens,
                learning_rate=RATE,
                max_steps=steps + 1,
                logging_steps=1,
                beta=0.0,
                bf16=on_gpu,
                use_cpu=not on_gpu,
                **(colocated if on_gpu else {}),
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    steady = [later - earlier for earlier, later in pairwise(marks)]
    return size.samples / statistics.median(steady), statistics.median(lengths[1:])


if __name__ == "__main__":
    main()
