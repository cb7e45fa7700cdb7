"""The cost of serving a new policy: bytes and milliseconds of `merged`, `adapter` and a push of the full weights.

    python jobs/benchmarks/weight_sync.py [--quick] [--device cpu|cuda] [--graphs] [--model MODEL]
        [--metrics RUN/metrics/grpo.jsonl] --json FILE

One vLLM engine in a Ray actor, as in stage 2; a rank 8 adapter on QKVGUD, of which 40 % of the elements change, as at θ
= 0.9. `merged` and `adapter` send the changes and are timed from the learner's parameters to the engine's answer,
including digest and file. The full push is the method of libraries without LoRA support: the sender merges and sends
every weight of the model, and the engine loads it. A sync's share is of a step of 8 prompts × 8 completions × 64
tokens, strictly on-policy: sampled on the same engine, then trained on by stage 2's learner. The policy check after
each sync (canaries and the prefix cache) is timed separately. `--graphs` lets the engines capture CUDA graphs.
`--metrics` adds the share of a finished run's steps that its sync, and the learner's wait for the check, took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from _full_push import FullPushEngine
from _rows import Row, print_table, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorapar_ray.adapters import adapter_state, attach_lora, lora_scaling, merged_weights, save_adapter
from lorapar_ray.config import EngineConfig, GrpoConfig, Resources
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.policy import PolicySender
from lorapar_ray.grpo.job import CANARIES, CANARY_CONTEXT, CANARY_TOKENS
from lorapar_ray.grpo.learner import Learner
from lorapar_ray.grpo.samples import MiniBatch, Sample
from lorapar_ray.grpo.worker import GrpoJob
from lorapar_ray.models import resolve_model
from lorapar_ray.precision import torch_dtype
from lorapar_ray.session import ray_session

ACTIVE = 0.4
GOAL_SHARE = 0.01
PROMPTS, GROUP, TOKENS = 8, 8, 64
ENGINE = EngineConfig(max_model_len=512, max_num_seqs=64, enforce_eager=True)
RESOURCES = {"cpu": Resources(cpus=1, threads=2, gpus=0), "cuda": Resources(cpus=1, threads=2, gpus=0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of ten")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--model", default="package:smollm2-135m-instruct")
    parser.add_argument("--metrics", type=Path, help="metrics/grpo.jsonl of a run")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else 10
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    model, resources = resolve_model(arguments.model), RESOURCES[arguments.device]
    engine = ENGINE.model_copy(update={"enforce_eager": not arguments.graphs})
    with ray_session(), TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype("auto", torch.device("cpu")))
        peft_model = attach_lora(base, rank=8, alpha=16, init="gaussian")
        save_adapter(peft_model, adapter)
        config, state = (adapter / "adapter_config.json").read_text(encoding="utf-8"), adapter_state(peft_model)
        del base, peft_model
        measured = {
            sync: measure(start(model, sync, engine, resources), sync, config, state, rounds)
            for sync in ("merged", "adapter")
        }
        full = push_everything(model, config, state, rounds, Path(scratch), engine, resources)
        learning = learning_seconds(model, adapter, measured["merged"].samples, resources)
    rows = [Row("a step's learning", learning, None, "s", None, "–", None)]
    for sync, found in measured.items():
        step = found.sync_s + found.check_s + found.rollout_s + learning
        rows += [
            row(f"{sync}: bytes", found.size / 2**20, full[1] / 2**20, "MiB", "changed elements only", True),
            row(f"{sync}: time", found.sync_s * 1e3, full[0] * 1e3, "ms", "–", None),
            Row(f"{sync}: time of the policy check", found.check_s * 1e3, None, "ms", None, "–", None),
            Row(f"{sync}: a step's rollouts", found.rollout_s, None, "s", None, "–", None),
            share_row(f"{sync}: share of a step", found.sync_s / step),
            share_row(f"{sync}: the policy check's share", found.check_s / step),
        ]
    if arguments.metrics is not None:
        rows.append(share_row("a run's steps: sync and waiting for the check", share_in(arguments.metrics)))
    print_table(rows)
    write_rows(arguments.json, rows)


@dataclass(frozen=True)
class Sync:
    """Measurements of one method."""

    sync_s: float
    check_s: float
    rollout_s: float
    size: int
    """Bytes sent."""
    samples: list[Sample]
    """The samples of the step's rollouts."""


def row(name: str, ours: float, peer: float, unit: str, goal: str, met: bool | None) -> Row:
    return Row(f"{name} vs full weights", ours, peer, unit, ours / peer, goal, met)


def share_row(name: str, share: float) -> Row:
    return Row(name, share, None, "", None, f"< {GOAL_SHARE:g}", share < GOAL_SHARE)


def share_in(metrics: Path) -> float:
    """Share of a run's steps, without the first, in which engines loaded a policy or the learner waited for its
    check."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()][1:]
    spent = sum(line["seconds/sync"] + line["seconds/wait_for_proof"] for line in lines)
    return float(spent / sum(line["seconds"] for line in lines))


def start(model: str, sync: str, settings: EngineConfig, resources: Resources) -> Any:
    engine = start_engine(model, settings, resources, seed=0, sync=sync, max_lora_rank=8)
    ray.get(engine.start.remote())
    return engine


def measure(engine: Any, sync: str, config: str, state: dict[str, torch.Tensor], rounds: int) -> Sync:
    """Medians of `rounds` syncs and their policy checks, and a step's rollouts afterwards."""
    generator = torch.Generator().manual_seed(0)
    masks = {key: torch.rand(value.shape, generator=generator) < ACTIVE for key, value in state.items()}
    sender = PolicySender(config, masks)
    ray.get(engine.load_policy.remote(sender.policy(0, state)))
    canaries = token_rows(CANARIES, CANARY_TOKENS, seed=1)
    size, times, checks = 0, [], []
    for version in range(1, rounds + 1):
        state = {key: value + 1e-3 * masks[key] for key, value in state.items()}
        start = time.perf_counter()
        policy = sender.policy(version, state)
        loaded = ray.get(engine.load_policy.remote(ray.put(policy)))
        times.append(time.perf_counter() - start)
        if loaded != policy.digest:
            raise SystemExit(f"{sync}: the engine loaded another policy")
        size = len(policy.tensors)
        start = time.perf_counter()
        scored = [engine.score.remote(canary, CANARY_CONTEXT) for canary in canaries]
        ray.get([*scored, engine.cache_gap.remote(canaries[0])])
        checks.append(time.perf_counter() - start)
    prompts = token_rows(PROMPTS, 64, seed=0)
    sampling = {"n": GROUP, "temperature": 1.0, "max_tokens": TOKENS, "seed": 0, "ignore_eos": True}
    start = time.perf_counter()
    groups = ray.get(engine.generate.remote(prompts, sampling))
    rollout = time.perf_counter() - start
    ray.kill(engine)
    samples = [
        sample(prompt, done, place)
        for prompt, group in zip(prompts, groups, strict=True)
        for place, done in enumerate(group)
    ]
    return Sync(statistics.median(times), statistics.median(checks), rollout, size, samples)


def token_rows(count: int, length: int, seed: int) -> list[list[int]]:
    """Different rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = torch.randint(5, 4000, (count, length), generator=generator).tolist()
    return rows


def sample(prompt: list[int], done: Completion, place: int) -> Sample:
    """A completion with an advantage, of alternating sign."""
    return Sample(prompt, done.token_ids, done.logprobs, (-1.0) ** place, done.finished, done.version)


def learning_seconds(model: str, adapter: Path, samples: list[Sample], resources: Resources) -> float:
    """Seconds of stage 2's learner for one step on these samples, including its canaries; the second of two."""
    settings = GrpoConfig(learning_rate=1e-5)
    job = GrpoJob(
        model={"path": model},
        settings=settings.model_dump(mode="json"),
        base=model,
        adapter_in=str(adapter),
        adapter_out="",
        regions=None,
        canaries=[[ids, CANARY_CONTEXT] for ids in token_rows(CANARIES, CANARY_TOKENS, seed=1)],
        checkpoints="",
        metrics="",
        samples="",
        steps=2,
        coordinator="",
        run="",
        seed=0,
    )
    torch.set_num_threads(resources.compute_threads)
    learner, seconds = Learner([job]), 0.0
    batch = MiniBatch(samples, sum(sample.count for sample in samples), len(samples))
    for step in range(2):
        start = time.perf_counter()
        learner.step({0: [batch]}, {0: step}, world=1)
        learner.canaries()
        seconds = time.perf_counter() - start
    return seconds


def push_everything(
    model: str,
    config: str,
    state: dict[str, torch.Tensor],
    rounds: int,
    scratch: Path,
    engine_settings: EngineConfig,
    resources: Resources,
) -> tuple[float, int]:
    """(median seconds, bytes) of merging on the sender's side, sending every weight and loading all of them."""
    settings = engine_settings.model_copy(update={"extra": {"worker_extension_cls": "_full_push.FullLoader"}})
    engine = start_engine(model, settings, resources, seed=0, actor=FullPushEngine)
    ray.get(engine.start.remote())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(Path(model).glob("*.safetensors")):
        weights |= load_file(file)
    scaling, times, size = lora_scaling(json.loads(config)), [], 0
    for _ in range(rounds):
        start = time.perf_counter()
        merged = {**weights, **dict(merged_weights(weights, state, scaling=scaling, dtype=torch.bfloat16))}
        file = scratch / "full.safetensors"
        save_file(merged, file)
        size = file.stat().st_size
        ray.get(engine.push.remote(ray.put(file.read_bytes())))
        times.append(time.perf_counter() - start)
    ray.kill(engine)
    return statistics.median(times), size


if __name__ == "__main__":
    main()
