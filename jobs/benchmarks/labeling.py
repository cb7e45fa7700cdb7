"""Votes per second of the whole Ray path, compared with vLLM offline and Ray's batch processors; then without engines.

    python jobs/benchmarks/labeling.py [--quick] --json FILE

First, one real teacher (SmolLM2-135M-Instruct from its package), with the same voting prompts for generated questions
and the same engine settings: `lorapar label` (Serve replica, Ray Data, vote store) compared with `vllm.LLM.generate` in
one process (the limit), `ServeDeploymentProcessorConfig` over `ray.serve.llm`, and `vLLMEngineProcessorConfig`. Ours
and offline's rates are of the last three quarters of the votes; start times do not count (see `_labeling_peers`).

Second, five simulated teachers of fixed latency: rows per second compared with latency × concurrency, memory of the
driver and of the requesting worker between the first fifth and the end, and the majority's accuracy compared with the
binomial's.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import comb
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from _labeling_peers import engine_processor, offline, serve_processor
from _rows import Row, print_table, write_rows

from lorapar_ray.config import Config, EngineConfig, Resources
from lorapar_ray.datasets.prepare import prepare
from lorapar_ray.datasets.rows import iterate_rows, read_table
from lorapar_ray.labeling import job
from lorapar_ray.labeling.hosted import choice_tokens
from lorapar_ray.labeling.job import label
from lorapar_ray.labeling.prompts import voting_prompt, with_template
from lorapar_ray.labeling.simulated import true_system
from lorapar_ray.labeling.store import VoteStore
from lorapar_ray.models import resolve_model
from lorapar_ray.runs import RunDirectory
from lorapar_ray.session import ray_session

MODEL = "package:smollm2-135m-instruct"
ENGINE = EngineConfig(max_model_len=1024, max_num_seqs=32, enforce_eager=True)
RESOURCES = Resources(cpus=1, threads=2)
LATENCY_S, CONCURRENCY, TEACHERS, ACCURACY = 0.2, 128, 5, 0.7
FULL = 100_000
LOGICAL_CPUS = 8
Arrivals = list[tuple[float, int]]
"""(wall-clock seconds, votes that arrived then)."""
OF_THE_LIMIT, OF_THE_LATENCY, GROWTH_MIB = 0.9, 0.9, 32.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer questions: minutes")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    parser.add_argument("--only", choices=["engines", "plumbing"], help="one of the two parts")
    arguments = parser.parse_args()
    rows: list[Row] = []
    if arguments.only != "plumbing":
        rows += engines(192 if arguments.quick else 512)
    if arguments.only != "engines":
        rows += plumbing(10_000 if arguments.quick else FULL)
    print_table(rows)
    write_rows(arguments.json, rows)


def engines(questions: int) -> list[Row]:
    """The whole path with one real teacher, and its peers."""
    with tempfile.TemporaryDirectory(prefix="labeling-") as folder:
        run = RunDirectory(Path(folder))
        source = {"reader": "reasoning_gym", "task": "gsm_symbolic", "rows": questions, "seed": 1}
        teacher = {
            "name": "teacher",
            "model": MODEL,
            "engine": ENGINE.model_dump(),
            "resources": RESOURCES.model_dump(),
        }
        config = voting(source, [teacher], rows_per_block=16, concurrency=48)
        prepare(config, run)
        texts, prompts, choices = tokenised(config, run)
        model = resolve_model(MODEL)
        limit = offline(model, ENGINE, RESOURCES, prompts, choices)
        with ray_session(), arrivals() as found:
            label(config, run)
        ours, rows = rate(found), []
        rows.append(comparison("vLLM offline, one process", ours, limit, OF_THE_LIMIT))
        for name, peer in (
            ("Ray Data ServeDeploymentProcessor over ray.serve.llm", serve_processor),
            ("Ray Data vLLMEngineProcessor", engine_processor),
        ):
            print(rows[-1], flush=True)
            with roomy_ray():
                rows.append(comparison(name, ours, peer(model, ENGINE, RESOURCES, texts, choices), 1.0))
        return rows


@contextmanager
def roomy_ray() -> Iterator[None]:
    """A local Ray with more nominal CPUs than the machine: the processors' stages need whole CPUs in addition to the
    engine's."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=LOGICAL_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


def plumbing(rows: int) -> list[Row]:
    """Everything but engines: simulated teachers of fixed latency."""
    with tempfile.TemporaryDirectory(prefix="labeling-") as folder:
        run, path = RunDirectory(Path(folder) / "run"), Path(folder) / "rows.jsonl"
        with path.open("w") as file:
            for i in range(rows):
                file.write(json.dumps({"prompt": f"What is {i} plus {i * 7 % 1000}?", "answer": str(i)}) + "\n")
        teachers = [
            {
                "name": f"simulated-{index}",
                "kind": "python",
                "model": "lorapar_ray.labeling.simulated:SimulatedTeacher",
                "extra_body": {"latency_s": LATENCY_S, "accuracy": ACCURACY},
            }
            for index in range(TEACHERS)
        ]
        source = {"reader": "file", "path": str(path)}
        config = voting(source, teachers, rows_per_block=64, concurrency=CONCURRENCY)
        prepare(config, run)
        with ray_session(), memory_over_votes() as held, arrivals(held) as found:
            label(config, run)
        right = [row["system"] == true_system(row["prompt"], row["answer"]) for row in read_table(run.labels)]
    allowed, expected = CONCURRENCY / LATENCY_S, majority_accuracy(ACCURACY, TEACHERS)
    accuracy, error = sum(right) / rows, 3.3 * (expected * (1 - expected) / rows) ** 0.5
    speed = rate(found) / TEACHERS
    growth = held.growth_mib(rows * TEACHERS)
    what = f"{rows:,} rows, {TEACHERS} simulated teachers"
    return [
        Row(
            f"{what}: {LATENCY_S} s latency, {CONCURRENCY} questions in flight",
            speed,
            allowed,
            "rows/s",
            speed / allowed,
            f"≥ {OF_THE_LATENCY}",
            speed >= OF_THE_LATENCY * allowed,
        ),
        Row(
            f"{what}: memory added after a fifth",
            growth,
            None,
            "MiB",
            None,
            f"≤ {GROWTH_MIB:.0f} MiB" if rows >= FULL else "– (too few rows to have warmed up)",
            growth <= GROWTH_MIB if rows >= FULL else None,
        ),
        Row(
            f"{what}: majority's accuracy, binomial's as peer",
            accuracy,
            expected,
            "share",
            accuracy / expected,
            f"± {error:.4f}",
            abs(accuracy - expected) <= error,
        ),
    ]


def majority_accuracy(p: float, n: int) -> float:
    """Probability that the majority of n independent teachers (n odd), each right with probability p, is right."""
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))


def voting(source: dict[str, Any], teachers: list[dict[str, Any]], **settings: Any) -> Config:
    return Config.model_validate(
        {
            "name": "benchmark",
            "model": {"path": MODEL},
            "data": {"train": [source]},
            "label": {"teachers": teachers, "resources": {"cpus": 0.5}, **settings},
        }
    )


def tokenised(config: Config, run: RunDirectory) -> tuple[list[str], list[list[int]], list[int]]:
    """(every voting prompt, its token ids, ids of the choices), as made by the hosted teacher."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    settings = config.label
    texts: list[str] = []
    prompts: list[list[int]] = []
    choices: list[int] = []
    for row in iterate_rows(run.data / "train.parquet"):
        prompt = voting_prompt(
            row.prompt, row.answer, label=settings, teacher=settings.teachers[0], student=job.student_name(config)
        )
        text = with_template(prompt, tokenizer, None, settings.prompt.choice)
        ids, choices = choice_tokens(tokenizer, text, [str(system) for system in sorted(settings.definitions)])
        texts.append(tokenizer.decode(ids))
        prompts.append(ids)
    if tokenizer(texts)["input_ids"] != prompts:
        raise SystemExit("the peers would be asked other tokens than we are")
    return texts, prompts, choices


class Held:
    """Private memory of the driver and of the requesting workers while votes arrive."""

    def __init__(self) -> None:
        self.votes = 0
        self.samples: list[tuple[int, float]] = []

    def sample(self) -> None:
        driver, total = psutil.Process(), 0
        for process in [driver, *driver.children(recursive=True)]:
            try:
                if process == driver or "Asker" in " ".join(process.cmdline()):
                    memory = process.memory_info()
                    total += memory.rss - memory.shared
            except psutil.NoSuchProcess:
                continue
        self.samples.append((self.votes, total / 2**20))

    def growth_mib(self, votes: int) -> float:
        """Growth from the mean of the second fifth of the votes to that of the last."""
        early = [mib for seen, mib in self.samples if votes / 5 <= seen < 2 * votes / 5]
        late = [mib for seen, mib in self.samples if seen >= 4 * votes / 5]
        return sum(late) / len(late) - sum(early) / len(early)


@contextmanager
def memory_over_votes() -> Iterator[Held]:
    held, done = Held(), threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            held.sample()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield held
    finally:
        done.set()
        watcher.join()


@contextmanager
def arrivals(held: Held | None = None) -> Iterator[Arrivals]:
    """Times at which votes reach the driver's store while the block runs; without those of the calibration."""
    found: Arrivals = []

    class TimedStore(VoteStore):
        def add(self, answers: Any, failures: Any = ()) -> None:
            stored = list(answers)
            super().add(stored, failures)
            if len(stored) > 1:
                found.append((time.time(), len(stored)))
            if held is not None:
                held.votes += len(stored)

    plain, job.VoteStore = job.VoteStore, TimedStore  # type: ignore[misc]
    try:
        yield found
    finally:
        job.VoteStore = plain  # type: ignore[misc]


def rate(found: Arrivals) -> float:
    """Votes per second after the first quarter has arrived."""
    total, seen = sum(count for _, count in found), 0
    for index, (start, count) in enumerate(found):
        seen += count
        if seen >= total / 4:
            return (total - seen) / (found[-1][0] - start) if index < len(found) - 1 else float("nan")
    return float("nan")


def comparison(name: str, ours: float, peer: float, goal: float) -> Row:
    return Row(
        f"one teacher, votes of the whole path vs {name}",
        ours,
        peer,
        "votes/s",
        ours / peer,
        f"≥ {goal:g}" if goal < 1 else "> 1",
        ours >= goal * peer,
    )


if __name__ == "__main__":
    main()
