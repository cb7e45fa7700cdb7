"""Evaluation: programs a second through the sandbox, beside the same programs run without one.

    python jobs/benchmarks/evaluation.py [--quick] [--parts sandbox] --json FILE

`sandbox`: honest programs of the kind that models write for HumanEval, each with its tests, in every layer that this
machine has, on as many at a time as there are cores. The peer is what evaluation scripts commonly do: a new
`python -c` for each program with its tests behind it, with a time limit and no isolation at all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _rows import Row, print_table, write_rows

from lorapar_ray.sandbox import Job, Limits, Sandbox, survey
from lorapar_ray.sandbox.tasks import tests_job

GOAL_PROGRAMS_PER_S = 20.0
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
    parser.add_argument("--quick", action="store_true", help="100 programs instead of 1,000")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    arguments = parser.parse_args()
    rows = [row for part in arguments.parts for row in PARTS[part](arguments.quick)]
    print_table(rows)
    write_rows(arguments.json, rows)


def sandbox_rate(quick: bool) -> list[Row]:
    jobs = honest(100 if quick else 1000)
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
    """Programs with their tests, no two of which are equal."""
    chosen = [(*PROGRAMS[number % len(PROGRAMS)], number) for number in range(count)]
    return [tests_job(code, tests.format(n=number)) for code, tests, number in chosen]


def unconfined(jobs: list[Job], cores: int) -> float:
    """Programs a second, each in a Python of its own."""

    def run(job: Job) -> int:
        program = f"{job.setup}\n{job.code}\n{job.tests}\n"
        return subprocess.run([sys.executable, "-c", program], timeout=SECONDS, check=False).returncode

    start = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        codes = list(pool.map(run, jobs))
    if any(codes):
        raise SystemExit(f"{sum(code != 0 for code in codes)} of {len(jobs)} honest programs fail without a sandbox")
    return len(jobs) / (time.perf_counter() - start)


PARTS: dict[str, Callable[[bool], list[Row]]] = {"sandbox": sandbox_rate}
"""Each takes whether to be quick."""


if __name__ == "__main__":
    main()
