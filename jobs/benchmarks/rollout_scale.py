"""Stage 2's plumbing on a simulated cluster: how close it comes to the ideal, and whether its memory stays flat.

    python jobs/benchmarks/rollout_scale.py [--quick] --json FILE

Engines and learner sleep (see `_simulated_cluster`); coordinator, queue, reward workers, policy messages and Ray are
real, all on this machine. Work grows with the engines: each decodes 16 sequences at once and gets 4 or 16 groups of 8 a
step, so that its slots are filled two or eight times over; lengths are log-normal up to four medians. The learner takes
two thirds of the mean generation time of a step. Ideal: a step takes the larger of its generation work spread evenly
over all slots, and its training. The peer of each row is that ideal. Memory: resident bytes of the coordinator's
process after a tenth of 10,000 steps and at their end.

No scheduler reaches the ideal at staleness 1 with few fillings: a sequence begun under version v must be trained on at
v + 1 at the latest, so two steps take at least one training and the longest way through an engine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
import torch
from _rows import Row, print_table, write_rows
from _simulated_cluster import Engines, Load

from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.engines.policy import PolicySender
from lorapar_ray.grpo.coordinator import Coordinator
from lorapar_ray.models import resolve_model
from lorapar_ray.session import ray_session

MODEL = "package:smollm2-135m-instruct"
GROUP_SIZE, SLOTS = 8, 16
LOADS = 4, 16
"""Groups an engine gets a step."""
MEDIAN_S = 1.2
"""Of a sequence. Chains of thought take longer, which is easier on the plumbing."""
TRAINING_SHARE = 2 / 3
WARM_UP = 3
GOAL = 0.95
ELEMENTS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 8 engines, fewer steps")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    arguments = parser.parse_args()
    rows = []
    with ray_session():
        for row in measured(arguments.quick):
            print(f"{row.name}: {row.ratio:.3f}", file=sys.stderr, flush=True)
            rows.append(row)
            write_rows(arguments.json, rows)
    print_table(rows)


def measured(quick: bool) -> Iterator[Row]:
    """Every row, as soon as it is there: in full this takes most of an hour."""
    for groups, engines in product(LOADS, (1, 8) if quick else (1, 8, 64)):
        for staleness in (1, 4) if quick else (0, 1, 4):
            yield scale(engines, groups, staleness, steps=6 if quick else 10)
    yield memory(1_000 if quick else 10_000)


def scale(engines: int, groups: int, staleness: int, steps: int) -> Row:
    """Steps per second in steady state beside the ideal, with so many groups a step for each engine."""
    load = Load(slots=SLOTS, median_s=MEDIAN_S)
    generation = groups * GROUP_SIZE * load.mean() / SLOTS
    training = TRAINING_SHARE * generation
    ideal = 1 / max(generation, training)
    plan = plan_of(engines, groups * engines, staleness, steps + WARM_UP)
    marks = run(plan, Engines(engines, load, *answer_tokens()), training)[0]
    ours = steps / (marks[-1] - marks[WARM_UP - 1])
    goal, met = (f"≥ {GOAL:g}", ours / ideal >= GOAL) if staleness else ("–", None)
    name = f"simulated, {engines} engines, {groups} groups each, staleness {staleness}"
    return Row(name, ours, ideal, "steps/s", ours / ideal, goal, met)


def memory(steps: int) -> Row:
    """Growth of the coordinator's memory once it has run for a while."""
    load = Load(slots=SLOTS, median_s=0.0)
    plan = plan_of(engines=1, prompts=1, staleness=1, steps=steps)
    _, sizes = run(plan, Engines(1, load, *answer_tokens()), training=0.0)
    early, late = sizes[steps // 10] / 2**20, sizes[-1] / 2**20
    name = f"coordinator after {steps:,} simulated steps beside {steps // 10:,}"
    return Row(name, late, early, "MiB", late / early, "≤ 1.05", late <= 1.05 * early)


def plan_of(engines: int, prompts: int, staleness: int, steps: int) -> dict[str, Any]:
    """A coordinator's plan; half of the completions are integers, which is what its reward is for."""
    settings = {
        "rollout_actors": engines,
        "prompts_per_step": prompts,
        "group_size": GROUP_SIZE,
        "rollout_engine": {"max_num_seqs": SLOTS},
        "max_staleness": staleness,
        "refill_limit": 0,
        "rewards": [{"name": "integer_answer"}],
        "reward_workers": 2,
    }
    row = {"prompt": "Say a number.", "response": "7", "answer": "7", "prompt_ids": [1, 2, 3]}
    rows = [{**row, "id": str(number)} for number in range(4 * prompts)]
    return {
        "settings": settings,
        "rows": rows,
        "steps": steps,
        "seed": 0,
        "model": resolve_model(MODEL),
        "trust_remote_code": False,
        "lora_rank": 8,
        "judge": None,
    }


def answer_tokens() -> tuple[int, int]:
    """A token that is an integer and one that is not."""
    tokenizer = load_encoder(resolve_model(MODEL), None).tokenizer
    return tokenizer.encode("7")[0], tokenizer.encode("x")[0]


def run(plan: dict[str, Any], engines: Engines, training: float) -> tuple[list[float], list[int]]:
    """Be the learner for `plan["steps"]` steps; after each the (monotonic time, coordinator's resident bytes)."""
    coordinator = ray.remote(_Coordinator).options(num_cpus=0, max_concurrency=1000).remote(plan, engines)
    sender = PolicySender("{}")
    parameters = {"m.lora_A.weight": torch.zeros(ELEMENTS)}
    marks, sizes = [], []
    ray.get(coordinator.start.remote())
    process = psutil.Process(ray.get(coordinator.pid.remote()))
    ray.get(coordinator.publish.remote(sender.policy(0, parameters), []))
    for step in range(plan["steps"]):
        ray.get(coordinator.batch.remote(step, 0, 1))
        time.sleep(training)
        ray.get(coordinator.publish.remote(sender.policy(step + 1, parameters), []))
        marks.append(time.monotonic())
        sizes.append(process.memory_info().rss)
    ray.kill(coordinator)  # and with it the reward workers it owns
    engines.stop()
    return marks, sizes


class _Coordinator(Coordinator):
    """Says which process it is."""

    async def pid(self) -> int:
        import os

        return os.getpid()


if __name__ == "__main__":
    main()
