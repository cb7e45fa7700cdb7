"""Time from an engine's actor to its first token, by phase, compared with vLLM's default start.

    python jobs/benchmarks/startup.py [--quick] [--device cpu|cuda] [--graphs] [--model MODEL] --json FILE

One engine as stage 2 starts it; then three at once, as teachers start. The peer is stock vLLM's `AsyncLLM` with the
same arguments in a fresh process, which spawns its core and, on a CPU, its worker. Both are timed from the start of
their process to the first token. `--graphs` captures CUDA graphs (on a CPU: compiles); else engines are eager.
`--quick` starts one engine only, of a tiny model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from _rows import Row, print_table, write_rows
from _tiny_model import tiny_model

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.settings import engine_arguments, engine_environment
from lorapar_ray.models import resolve_model
from lorapar_ray.session import ray_session

PROMPT, SAMPLING = [5, 6, 7, 8], {"n": 1, "temperature": 0.0, "max_tokens": 1}
GOALS = {"tiny": (8.0, None), "cpu": (20.0, 60.0), "cuda": (35.0, None)}
"""Most seconds for one engine and for three at once."""
STOCK = """
import asyncio, json, sys
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

async def main(arguments, prompt):
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    request = engine.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=1, logprobs=0), request_id="0")
    async for _ in request:
        print("first token", flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main(*json.loads(sys.argv[1])))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one engine of a tiny model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--model", default="package:smollm2-135m-instruct")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    engine = EngineConfig(max_model_len=512, max_num_seqs=32, enforce_eager=not arguments.graphs)
    gpus = 1.0 if arguments.device == "cuda" else 0.0
    with TemporaryDirectory() as scratch:
        model = tiny_model(Path(scratch)) if arguments.quick else resolve_model(arguments.model)
        alone, together = GOALS["tiny" if arguments.quick and not gpus else arguments.device]
        peer = stock_seconds(model, engine, Resources(threads=2, gpus=gpus))
        with ray_session():
            ray.get(ray.remote(warmed).remote())  # the first worker's start includes Ray's start
            seconds, phases = started(model, engine, Resources(threads=2, gpus=gpus), 1)
            rows = [row("actor to first token", seconds, peer, alone)]
            rows += [row(f"of it: {name}", taken, None, None) for name, taken in phases.items()]
            if not arguments.quick:
                share = Resources(cpus=0.3, threads=1, gpus=round(gpus * 0.3, 2))
                seconds, _ = started(model, engine, share, 3)
                rows.append(row("three at once: actors to last first token", seconds, None, together))
    print_table(rows)
    write_rows(arguments.json, rows)


def row(name: str, ours: float, peer: float | None, goal: float | None) -> Row:
    ratio = None if peer is None else ours / peer
    if goal is None:
        return Row(name, ours, peer, "s", ratio, "–", None)
    return Row(name, ours, peer, "s", ratio, f"≤ {goal:g}", ours <= goal)


def warmed() -> None:
    """A task that does nothing."""


def started(model: str, engine: EngineConfig, resources: Resources, count: int) -> tuple[float, dict[str, float]]:
    """(seconds from creating `count` actors to the last one's first token, the first one's seconds by phase)."""
    start = time.perf_counter()
    actors = [start_engine(model, engine, resources, seed=0) for _ in range(count)]
    told: list[dict[str, Any]] = ray.get([actor.start.remote() for actor in actors])
    ray.get([actor.generate.remote([PROMPT], SAMPLING) for actor in actors])
    seconds = time.perf_counter() - start
    for actor in actors:
        ray.kill(actor)
    return seconds, told[0]["seconds"]


def stock_seconds(model: str, engine: EngineConfig, resources: Resources) -> float:
    """Stock vLLM: from a fresh process to its first token."""
    arguments = engine_arguments(model, engine, seed=0, trust_remote_code=False)
    ours = ("TORCHDYNAMO_DISABLE", "VLLM_ENABLE_V1_MULTIPROCESSING")
    environment = {key: value for key, value in engine_environment(engine, resources).items() if key not in ours}
    start = time.perf_counter()
    command = [sys.executable, "-c", STOCK, json.dumps([arguments, PROMPT])]
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if not any(line == "first token\n" for line in process.stdout):  # stops reading at it
        raise SystemExit("stock vLLM gave no token")
    seconds = time.perf_counter() - start
    process.wait()
    return seconds


if __name__ == "__main__":
    main()
