"""Memory of the driver while many rows go from a file to stage 1's first step.

    python jobs/benchmarks/data_path.py [--quick] [--rows N] --json FILE

N questions (a million; --quick: 100,000) and a tenth of them, each in a separate process, go through label (one
simulated teacher without latency), score (8 examples of each System), partition and stage 1's first step, on a random
model of two layers. Memory is the driver's peak in each stage, resident and not backed by files. The last row compares
the memory of all labelled questions in a process: as the memory-mapped token file, and as Python rows (`to_pylist`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _memory import private_memory
from _rows import Row, print_table, write_rows
from _tiny_model import tiny_model

from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.datasets.tokens import Questions, Selection
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory
from lorapar_ray.session import ray_session

ROWS, QUICK = 1_000_000, 100_000
STAGES = ("label", "score", "partition", "sft")
FLAT = 1.25
"""Memory counts as flat up to this ratio to the peak with a tenth of the rows."""
AT_ONCE = 1024
"""Questions in flight, and in a block: teachers answer at once here, and each block is a Ray task."""
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} rows: minutes")
    parser.add_argument("--rows", type=int, help=f"default {ROWS:,}")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    parser.add_argument("--one", action="store_true", help="measure one size in this process (used by the benchmark)")
    arguments = parser.parse_args()
    count = arguments.rows or (QUICK if arguments.quick else ROWS)
    if arguments.one:
        arguments.json.write_text(json.dumps(measured(count)))
        return
    fewer, more = (apart(size) for size in (count // 10, count))
    rows = [flat(f"driver in {stage}, {count:,} rows vs a tenth", more[stage], fewer[stage]) for stage in STAGES]
    mapped, listed = more["mapped"], more["listed"]
    ratio = mapped / listed
    rows.append(
        Row(f"{count:,} questions, memory-mapped vs Python rows", mapped, listed, "MiB", ratio, "≤ 0.1", ratio <= 0.1)
    )
    rows += [Row(f"{stage}, {count:,} rows", more[f"{stage}_s"], None, "s", None, "–", None) for stage in STAGES]
    rows.append(Row("run directory", more["disk"], None, "MiB", None, "–", None))
    print_table(rows)
    write_rows(arguments.json, rows)


def flat(name: str, more: float, fewer: float) -> Row:
    return Row(name, more, fewer, "MiB", more / fewer, f"≤ {FLAT}", more <= FLAT * fewer)


def apart(rows: int) -> dict[str, float]:
    """`measured` in a new process, whose memory no earlier work has touched."""
    with TemporaryDirectory(prefix="data-path-") as folder:
        file = Path(folder) / "found.json"
        subprocess.run([sys.executable, __file__, "--one", "--rows", str(rows), "--json", str(file)], check=True)
        found: dict[str, float] = json.loads(file.read_text())
    print(f"{rows:,} rows: {found}", flush=True)
    return found


def measured(count: int) -> dict[str, float]:
    """Each stage's peak in MiB and its seconds (`<stage>_s`); `mapped`, `listed` and `disk` in MiB."""
    found: dict[str, float] = {}
    with TemporaryDirectory(prefix="data-path-") as folder:
        config, run = Config.model_validate(fields(Path(folder), count)), RunDirectory(Path(folder) / "run")
        run.open(config)
        with ray_session():
            for stage in STAGES:
                start = time.perf_counter()
                with private_memory() as memory:
                    run_stage(config, run, stage)
                found[stage], found[f"{stage}_s"] = memory.peak / MIB, time.perf_counter() - start
        found["disk"] = sum(file.stat().st_size for file in run.root.rglob("*") if file.is_file()) / MIB
        chosen = Selection(str(run.work / "tokens.arrow"), [1, 2], "grpo.systems", config.grpo.max_prompt_length)
        with private_memory() as memory:
            questions = Questions(chosen)
            assert len(questions) == count and questions[count - 1]["prompt"]
        found["mapped"] = max(memory.added, 2**16) / MIB
        with private_memory() as memory:
            assert len(read_table(run.labels)) == count
        found["listed"] = memory.added / MIB
    return found


def fields(folder: Path, count: int) -> dict[str, Any]:
    """A config with a tiny student and `count` generated questions."""
    source = folder / "rows.jsonl"
    with source.open("w") as file:
        for i in range(count):
            more = i * 7 % 1000
            file.write(json.dumps({"prompt": f"What is {i} plus {more}?", "answer": str(i + more)}) + "\n")
    teacher = {"name": "simulated", "kind": "python", "model": "lorapar_ray.labeling.simulated:SimulatedTeacher"}
    return {
        "name": "data-path",
        "model": {"path": tiny_model(folder / "student"), "dtype": "float32"},
        "data": {"train": [{"reader": "file", "path": str(source)}]},
        "label": {
            "teachers": [teacher],
            "calibration": "none",
            "quorum": 1,
            "concurrency": AT_ONCE,
            "rows_per_block": AT_ONCE,
        },
        "adapter": {"rank": 4, "alpha": 8, "init": "gaussian"},
        "score": {"examples_per_system": 8, "unit_size": 8, "max_length": 64},
        "sft": {"max_steps": 1, "batch_size": 8, "max_length": 64},
        "grpo": {"max_prompt_length": 64},
    }


if __name__ == "__main__":
    main()
