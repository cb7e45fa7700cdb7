"""`balance: auto` in a real run of stage 2, compared with the best step size of a grid.

    python jobs/benchmarks/balance.py [--quick] --json FILE

Real engines, learner and Ray with a tiny model, whose steps have much fixed time: publishing and checking a policy, the
update, and on one engine the tail of the longest completion. `auto` begins with the smallest size of the grid; after 20
steps its choice is fixed. Then a run with this size and a run with every size of the grid are measured in the same way:
samples per second over the steps after the second. `rollout_scale.py` does the same in a simulation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _rows import Row, print_table, write_rows
from _stage2_run import GROUP, SIZES, prepare
from _tiny_model import tiny_model

from lorapar_ray.adapters.job import make_adapter
from lorapar_ray.config import Config
from lorapar_ray.grpo.job import train_stage2
from lorapar_ray.runs import RunDirectory
from lorapar_ray.session import ray_session

GRID = 4, 8, 16, 32, 64
"""Prompts per step."""
AUTO_STEPS, STEPS, QUICK_STEPS, SKIPPED = 20, 10, 6, 2
GOAL = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes instead of five, fewer steps")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    grid, steps = (GRID[::2], QUICK_STEPS) if arguments.quick else (GRID, STEPS)
    size = replace(SIZES[arguments.device], prompts=grid[0])
    with TemporaryDirectory() as folder, ray_session():
        config, run = prepare(tiny_model(Path(folder) / "model"), steps, Path(folder) / "run", size)
        make_adapter(config, run, run.adapter)
        shutil.copytree(run.adapter, run.sft / "adapter")
        auto = {"balance": "auto", "balance_prompts": (grid[0], grid[-1]), "steps": AUTO_STEPS}
        chosen = prompts_of(steps_of(config, run, **auto)[-1])
        rates = {prompts: rate(config, run, prompts) for prompts in grid}
        ours = rate(config, run, chosen)
    print(", ".join(f"{prompts} prompts: {found:.0f} samples/s" for prompts, found in rates.items()), file=sys.stderr)
    best = max(rates.values())
    name = f"balance: auto, {chosen} prompts a step after {AUTO_STEPS} steps, vs the best of a grid"
    row = Row(name, ours, best, "samples/s", ours / best, f"≥ {GOAL:g}", ours >= GOAL * best)
    print_table([row])
    write_rows(arguments.json, [row])


def rate(config: Config, run: RunDirectory, prompts: int) -> float:
    """Samples per second with steps of this many prompts."""
    lines = steps_of(config, run, prompts_per_step=prompts)[SKIPPED:]
    return len(lines) * prompts * GROUP / sum(line["seconds"] for line in lines)


def prompts_of(line: dict[str, Any]) -> int:
    """Number of prompts of a step."""
    return len(line["prompts"])


def steps_of(config: Config, run: RunDirectory, **settings: Any) -> list[dict[str, Any]]:
    """What stage 2 wrote of each step, begun anew with these settings."""
    shutil.rmtree(run.grpo, ignore_errors=True)
    train_stage2(config.model_copy(update={"grpo": config.grpo.model_copy(update=settings)}), run)
    return [json.loads(line) for line in (run.metrics / "grpo.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
