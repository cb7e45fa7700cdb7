"""Serving: tokens that `auto` saves on held-out questions, and requests per second compared with vLLM's server.

    python jobs/benchmarks/serving.py --run-dir DIR [--quick] --json FILE

`DIR` is a finished run with both stages. Its test questions go to `sft`, `grpo` and `auto`, greedily, under the run's
own limits; the peer of `auto` is stage 2's adapter for every question, as without routing. Then the same requests, from
16 clients, go to `grpo` on vLLM's server with the same engine settings and adapters. `--quick` sends 40 questions.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
from _rows import Row, print_table, write_rows
from openai import OpenAI

from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.engines.settings import engine_arguments, engine_environment, lora_arguments
from lorapar_ray.evaluation.judging import judge, judging_process
from lorapar_ray.models import resolve_model
from lorapar_ray.runs import RunDirectory
from lorapar_ray.serving.job import finished_adapters

CLIENTS = 16
START_S = 300.0


@dataclass(frozen=True)
class Answered:
    """One model's answers to all questions."""

    right: float
    tokens: int
    seconds: float
    systems: list[str | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="a finished run")
    parser.add_argument("--quick", action="store_true", help="40 questions")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    run = RunDirectory(arguments.run_dir)
    config = load_config(run.root / "config.yaml", [])
    rows = pq.read_table(run.data / "test.parquet").to_pylist()
    rows = rows[:: max(1, len(rows) // 40)][:40] if arguments.quick else rows
    with ours(run.root) as url:
        found = {model: answered(url, model, rows, config) for model in ("sft", "grpo", "auto")}
    with stock(config, run) as url:
        answered(url, "grpo", rows[:CLIENTS], config)
        peer = answered(url, "grpo", rows, config)
    auto, always = found["auto"], found["grpo"]
    table = [
        row("auto: accuracy, vs grpo for all", auto.right, always.right, "share"),
        row("auto: tokens of answers, vs grpo for all", auto.tokens, always.tokens, "tokens"),
        row("sft for all: accuracy", found["sft"].right, always.right, "share"),
        row("sft for all: tokens of answers", found["sft"].tokens, always.tokens, "tokens"),
        row("auto: questions that went to stage 2", auto.systems.count("2") / len(rows), None, "share"),
        row("16 clients, vs vLLM's server", len(rows) / always.seconds, len(rows) / peer.seconds, "requests/s", 0.95),
        row("16 clients to auto, vs grpo", len(rows) / auto.seconds, len(rows) / always.seconds, "requests/s"),
    ]
    print_table(table)
    write_rows(arguments.json, table)


def row(name: str, ours: float, peer: float | None, unit: str, least: float | None = None) -> Row:
    ratio = None if not peer else ours / peer
    goal, met = ("–", None) if least is None or ratio is None else (f"≥ {least:g}", ratio >= least)
    return Row(name, float(ours), None if peer is None else float(peer), unit, ratio, goal, met)


def answered(url: str, model: str, rows: list[dict[str, Any]], config: Config) -> Answered:
    """Greedy answers to `CLIENTS` concurrent clients."""
    client = OpenAI(base_url=url, api_key="-", timeout=600)
    system = config.model.system_prompt
    before: list[Any] = [] if system is None else [{"role": "system", "content": system}]

    def ask(question: str) -> tuple[str, int, str | None]:
        raw = client.chat.completions.with_raw_response.create(
            model=model,
            messages=[*before, {"role": "user", "content": question}],
            max_tokens=config.evaluate.max_new_tokens,
            temperature=0.0,
            stop=list(config.evaluate.stop) or None,
        )
        answer = raw.parse()
        count = 0 if answer.usage is None else answer.usage.completion_tokens
        return answer.choices[0].message.content or "", count, raw.headers.get("x-lorapar-system")

    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        texts, tokens, systems = zip(*pool.map(ask, [each["prompt"] for each in rows]), strict=True)
    seconds = time.perf_counter() - start
    with judging_process(config.evaluate.answer) as process:
        right, _ = judge(process, rows, list(texts))
    return Answered(sum(right) / len(rows), sum(tokens), seconds, list(systems))


@contextmanager
def ours(run: Path) -> Iterator[str]:
    """`lorapar serve` on a free port."""
    port = free_port()
    command = [sys.executable, "-m", "lorapar_ray.cli", "serve", "--run-dir", str(run), "--port", str(port)]
    with running(command, dict(os.environ), port) as url:
        yield url


@contextmanager
def stock(config: Config, run: RunDirectory) -> Iterator[str]:
    """vLLM's own server with the same engine settings and adapters."""
    port, settings = free_port(), config.evaluate
    adapters = finished_adapters(config, run)
    asked = engine_arguments(
        resolve_model(config.model.path), settings.engine, seed=config.seed, trust_remote_code=False
    )
    ranks = lora_arguments(2 * config.adapter.rank, len(adapters))
    # `vllm serve` needs a distribution named vllm; the CPU build has another name
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        asked["model"],
        "--port",
        str(port),
    ]
    command += ["--host", "127.0.0.1", "--served-model-name", "base", "--enable-lora", "--generation-config", "vllm"]
    command += ["--max-loras", str(ranks["max_loras"]), "--max-lora-rank", str(ranks["max_lora_rank"])]
    command += ["--max-model-len", str(asked["max_model_len"]), "--max-num-seqs", str(asked["max_num_seqs"])]
    command += ["--hf-overrides", '{"head_dtype": "float32"}', *(["--enforce-eager"] if asked["enforce_eager"] else [])]
    command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    ours = ("TORCHDYNAMO_DISABLE", "VLLM_ENABLE_V1_MULTIPROCESSING")
    environment = engine_environment(settings.engine, settings.resources)
    with running(command, os.environ | {k: v for k, v in environment.items() if k not in ours}, port) as url:
        yield url


@contextmanager
def running(command: list[str], environment: dict[str, str], port: int) -> Iterator[str]:
    """Run the server while the block runs; yields its address."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"did not start: {' '.join(command)}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    main()
