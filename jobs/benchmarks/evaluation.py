"""Evaluation: decisions compared with lm-eval's own class, speed with `vllm.LLM`, programs/s in the sandbox.

    python jobs/benchmarks/evaluation.py [--quick] [--parts agreement throughput scaling sandbox] [--data FOLDER]
        --json FILE

`agreement`: 300 questions and more each of GSM8K, MMLU and ARC-Easy (files in `--data`, as published), decided by our
model class with vLLM and by lm-eval's `hf` class; fewer with examples in the prompt; see `_agreement.py`. Details and
answers are written next to the JSON file: the same command resumes from them.

`throughput`: the same prompts through one of our engines and through `vllm.LLM` in a separate process
with the same arguments, in turns; once generating, once scoring a continuation.

`scaling`: the same prompts through two engines and through one, each on one CPU core (or one GPU).

`sandbox`: honest programs of the kind that models write for HumanEval, each with its tests, in every layer of this
machine, one per core at a time. The peer is the usual evaluation script: a new `python -c` for each program followed by
its tests, with a time limit and without isolation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING

import _agreement
from _rows import Row, print_table, write_rows

from lorapar_ray.sandbox import Job, Limits, Sandbox, survey
from lorapar_ray.sandbox.tasks import tests_job

if TYPE_CHECKING:
    from lorapar_ray.engines.requests import Request
    from lorapar_ray.evaluation.engines import Engines

GOAL_SAME = 0.99
GOAL_SPEED = 0.95
GOAL_PROGRAMS_PER_S = 20.0
SAMPLING = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True}
SECONDS = 30.0
PROGRAMS = (
    (
        "from typing import List\n\ndef close(numbers: List[float], threshold: float) -> bool:\n"
        "    ordered = sorted(numbers)\n    return any(b - a < threshold for a, b in zip(ordered, ordered[1:]))\n",
        "assert close([1.0, 2.0, 2.2], 0.3)\nassert not close([1.0, 2.0, {n}.0 + 9], 0.3)",
    ),
    (
        "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
        "assert fibonacci(10) == 55\nassert fibonacci({n} % 50 + 2) > 0",
    ),
    (
        "import re\nfrom collections import Counter\n\ndef words(text):\n"
        "    return Counter(re.findall(r'\\w+', text.lower()))\n",
        "assert words('A b a {n}') == {{'a': 2, 'b': 1, '{n}': 1}}",
    ),
    (
        "import heapq\n\ndef largest(values, n):\n    return heapq.nlargest(n, values)\n",
        "assert largest(list(range({n}, {n} + 100)), 2) == [{n} + 99, {n} + 98]",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer questions, prompts and programs")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public data sets")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for part in arguments.parts:
        rows += PARTS[part](arguments)
        write_rows(arguments.json, rows)
    print_table(rows)


def agreement(arguments: argparse.Namespace) -> list[Row]:
    details = arguments.json.with_suffix(".agreement")
    found = _agreement.compare(arguments.data, arguments.quick, arguments.device, details)
    (details / "agreement.json").write_text(json.dumps(_agreement.as_json(found), indent=2) + "\n")
    rows = []
    for each in found:
        share = each.same / each.decisions
        name = f"{each.task}, {each.questions} questions: same decisions as lm-eval's hf class"
        rows.append(Row(name, share, 1.0, "of decisions", share, f"≥ {GOAL_SAME:g}", share >= GOAL_SAME))
    return rows


def throughput(arguments: argparse.Namespace) -> list[Row]:
    from lorapar_ray.config import EngineConfig, Resources
    from lorapar_ray.engines.settings import engine_arguments, engine_environment, memory_share
    from lorapar_ray.evaluation.engines import Engines
    from lorapar_ray.models import resolve_model
    from lorapar_ray.session import ray_session

    rounds, gpu = 1 if arguments.quick else 2, arguments.device == "cuda"
    work, model = _work(64 if arguments.quick else 256), resolve_model(_agreement.MODEL)
    engine = EngineConfig(max_model_len=256, enforce_eager=not gpu)
    # on a GPU each of the two has a half
    resources = Resources(cpus=1, gpus=0.5 if gpu else 0, threads=len(os.sched_getaffinity(0)))
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ray_session(), Engines(model, engine, resources) as engines:
        job = Path(folder) / "job.json"
        spec = memory_share(resources) | engine_arguments(model, engine, seed=0, trust_remote_code=False)
        asked = {kind: [list(request.ids) for request in requests] for kind, requests in work.items()}
        job.write_text(json.dumps({"arguments": spec, **asked, "sampling": SAMPLING}))
        command = [sys.executable, str(Path(__file__).with_name("_llm_peer.py")), str(job)]
        environment = os.environ | engine_environment(engine, resources)
        with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment) as peer:
            assert peer.stdin is not None and peer.stdout is not None
            engines.start()
            while (line := peer.stdout.readline()).strip() != "ready":
                if not line:
                    raise SystemExit("vllm.LLM did not start")
            for turn in range(rounds + 1):  # the first is a warm-up of both
                for kind, requests in work.items():
                    print(kind, file=peer.stdin, flush=True)
                    theirs = float(peer.stdout.readline())
                    own = _seconds(engines, requests)
                    if turn:
                        seconds.setdefault((kind, "ours"), []).append(own)
                        seconds.setdefault((kind, "theirs"), []).append(theirs)
            peer.stdin.close()
    rows = []
    for kind, requests in work.items():
        own, theirs = (len(requests) / statistics.median(seconds[kind, who]) for who in ("ours", "theirs"))
        name = f"{len(requests)} prompts, {kind}, one engine, vs vllm.LLM"
        rows.append(Row(name, own, theirs, "prompts/s", own / theirs, f"≥ {GOAL_SPEED:g}", own / theirs >= GOAL_SPEED))
    return rows


def scaling(arguments: argparse.Namespace) -> list[Row]:
    from lorapar_ray.capacity import capacity
    from lorapar_ray.config import EngineConfig, Resources
    from lorapar_ray.evaluation.engines import Engines
    from lorapar_ray.models import resolve_model
    from lorapar_ray.session import ray_session

    rounds, gpu = 1 if arguments.quick else 2, arguments.device == "cuda"
    work, model = _work(32 if arguments.quick else 128), resolve_model(_agreement.MODEL)
    engine = EngineConfig(max_model_len=256, enforce_eager=not gpu)
    resources = Resources(cpus=1, gpus=1 if gpu else 0, threads=1)
    rates: dict[tuple[str, int], float] = {}
    with ray_session():
        if gpu and capacity().largest("GPU") < 2:
            print("scaling: one GPU here, so no second engine")
            return []
        for count in (1, 2):
            with Engines(model, engine, resources, count) as engines:
                engines.start()
                for kind, requests in work.items():
                    own = [_seconds(engines, requests) for _ in range(rounds + 1)][1:]
                    rates[kind, count] = len(requests) / statistics.median(own)
    rows = []
    for kind, requests in work.items():
        two, one = rates[kind, 2], rates[kind, 1]
        name = f"{len(requests)} prompts, {kind}, two engines of one {'GPU' if gpu else 'core'} each, vs one of them"
        rows.append(Row(name, two, one, "prompts/s", two / one, "", None))
    return rows


def _work(count: int) -> dict[str, list[Request]]:
    """The same prompts, to continue and to score a continuation of."""
    from lorapar_ray.datasets.chat import load_encoder
    from lorapar_ray.engines.requests import Request
    from lorapar_ray.models import resolve_model

    encode = load_encoder(resolve_model(_agreement.MODEL), None).tokenizer.encode
    prompts = [encode(f"Question: {row} boxes hold {row % 7 + 2} pens each.\nAnswer:") for row in range(count)]
    ending = encode(" There are many pens in all of the boxes.")
    return {
        "generate": [Request("generate", ids, sampling=SAMPLING) for ids in prompts],
        "score": [Request("score", [*ids, *ending], start=len(ids)) for ids in prompts],
    }


def _seconds(engines: Engines, requests: list[Request]) -> float:
    start = time.perf_counter()
    answered = sum(len(found) for found in engines.answers(requests))
    assert answered == len(requests)
    return time.perf_counter() - start


def sandbox_rate(arguments: argparse.Namespace) -> list[Row]:
    jobs = honest(100 if arguments.quick else 1000)
    cores = len(os.sched_getaffinity(0))
    peer = unconfined(jobs, cores)
    rows = []
    for finding in survey():
        if finding.layer is None:
            print(f"{finding.name}: {finding.detail}")
            continue
        with Sandbox(finding.layer.name, Limits(seconds=SECONDS), workers=cores) as sandbox:
            sandbox.run(jobs[:cores])  # starts the processes of the tests
            start = time.perf_counter()
            verdicts = sandbox.run(jobs)
            ours = len(jobs) / (time.perf_counter() - start)
        if wrong := [verdict for verdict in verdicts if not verdict.passed]:
            raise SystemExit(f"{finding.name}: {len(wrong)} of {len(jobs)} honest programs did not pass: {wrong[0]}")
        name = f"{len(jobs)} honest programs, {cores} cores, {finding.name}, vs no isolation"
        goal, met = f"> {GOAL_PROGRAMS_PER_S:.0f}", ours > GOAL_PROGRAMS_PER_S
        rows.append(Row(name, ours, peer, "programs/s", ours / peer, goal, met))
    return rows


def honest(count: int) -> list[Job]:
    """Different programs with their tests."""
    chosen = [(*PROGRAMS[number % len(PROGRAMS)], number) for number in range(count)]
    return [tests_job(code, tests.format(n=number)) for code, tests, number in chosen]


def unconfined(jobs: list[Job], cores: int) -> float:
    """Programs per second, each in a new Python process."""

    def run(job: Job) -> int:
        program = f"{job.setup}\n{job.code}\n{job.tests}\n"
        return subprocess.run([sys.executable, "-c", program], timeout=SECONDS, check=False).returncode

    start = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        codes = list(pool.map(run, jobs))
    if any(codes):
        raise SystemExit(f"{sum(code != 0 for code in codes)} of {len(jobs)} honest programs fail without a sandbox")
    return len(jobs) / (time.perf_counter() - start)


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "agreement": agreement,
    "throughput": throughput,
    "scaling": scaling,
    "sandbox": sandbox_rate,
}


if __name__ == "__main__":
    main()
