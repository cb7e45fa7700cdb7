"""Stage 2's throughput on a simulated cluster compared with the ideal, and the coordinator's cost.

    python jobs/benchmarks/rollout_scale.py [--quick] [--engines N …] [--staleness N …] [--only PART …] --json FILE

Engines, rewards and learner sleep (see `_simulated_cluster`); the coordinator, its queue, policy publishing, the
records in the object store and Ray are real, all on this machine. Each engine decodes 16 sequences at once and gets 32
groups of 8 per step, with 4,096 tokens per completion on average: 256 KiB per group, which the reward worker and the
learner fetch. Lengths are log-normal up to four medians. The learner takes two thirds of a step's mean generation time.

Ideal: a step takes the longer of its training and its generation work, spread evenly over all slots. This ideal is the
peer of each row. Busy share: processor seconds of the coordinator's process, over all threads, divided by wall-clock
seconds; with more than 64 engines also that of the busiest shard (`grpo.rollout_shards`). A sequence takes 4.7 s on
average, so an engine decodes 14,000 tokens/s, as an H100 did with a model of 135M; larger models are slower, and the
messages fewer by that factor. `--quick` takes half a second for the median instead of 4: eight times the messages.
Memory: resident bytes of the coordinator's process after a tenth of 10,000 steps and at the end, and bytes of the
object store at the end.

Balance: `balance: auto` has 20 steps, beginning with the grid's smallest size; then steps of the size that it chose are
compared with every size of the grid. The fixed time of a step is here the tail of its longest completion.

A step's records take 8 MiB for each engine, and up to `max_staleness` + 2 steps exist at once; rows that do not fit
this machine's object store are left out and named.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
import torch
from _rows import Row, print_table, write_rows
from _simulated_cluster import Engines, Load, SleepingRewards

from lorapar_ray.engines.policy import PolicySender
from lorapar_ray.grpo.coordinator import Coordinator
from lorapar_ray.grpo.fetching import fetch
from lorapar_ray.grpo.publishing import Publisher
from lorapar_ray.grpo.shards import ENGINES_EACH, Shards
from lorapar_ray.models import resolve_model
from lorapar_ray.session import ray_session

MODEL = "package:smollm2-135m-instruct"
GROUP_SIZE, SLOTS, GROUPS = 8, 16, 32
TOKENS, PROMPT_TOKENS = 4096, 256
GROUP_BYTES = GROUP_SIZE * TOKENS * 8
ENGINES = 1, 8, 64, 256
STALENESS = 1, 4
MEDIAN_S, QUICK_MEDIAN_S = 4.0, 0.5
"""Median time of a sequence."""
TRAINING_SHARE = 2 / 3
WARM_UP = 2
GOAL, BUSY_GOAL = 0.95, 0.2
PARTS = "scale", "balance", "memory"
ELEMENTS = 10_000
BALANCED_STEPS = 20
SIZES = 8, 16, 32, 64, 128
"""Prompts per step."""
BALANCED_ENGINES = 8
BALANCED_GOAL = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps; up to 64 engines, if none are named")
    parser.add_argument("--engines", type=int, nargs="+", help="engines to simulate")
    parser.add_argument("--staleness", type=int, nargs="+", default=STALENESS, help="`max_staleness` to simulate")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these rows and no others")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    rows = []
    with ray_session():
        for row in measured(arguments):
            print(f"{row.name}: {row.ratio:.3f}", file=sys.stderr, flush=True)
            rows.append(row)
            write_rows(arguments.json, rows)
    print_table(rows)


def measured(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yields each row when it is measured: the whole takes an hour."""
    quick, room = arguments.quick, ray.cluster_resources()["object_store_memory"]
    sizes = (arguments.engines or ENGINES[: -1 if quick else None]) if "scale" in arguments.only else ()
    for engines, staleness in product(sizes, arguments.staleness):
        if (staleness + 2) * engines * GROUPS * GROUP_BYTES > room:
            print(f"{engines} engines at staleness {staleness} do not fit {room / 2**30:.1f} GiB", file=sys.stderr)
        else:
            yield from scale(engines, staleness, 4, QUICK_MEDIAN_S if quick else MEDIAN_S)
    if "balance" in arguments.only:
        yield from balanced()
    if "memory" in arguments.only:
        yield from memory(1_000 if quick else 10_000)


def scale(engines: int, staleness: int, steps: int, median_s: float) -> Iterator[Row]:
    """Steady-state steps per second compared with the ideal, and the coordinator's cost."""
    load = Load(slots=SLOTS, median_s=median_s, mean_tokens=TOKENS)
    generation = GROUPS * GROUP_SIZE * load.median_s * load.mean() / SLOTS
    training = TRAINING_SHARE * generation
    ideal = 1 / max(generation, training)
    marks = run(engines, GROUPS * engines, staleness, steps + WARM_UP, load, training)
    first, last = marks[WARM_UP - 1], marks[-1]
    ours, name = steps / (last.at - first.at), f"{engines} engines, staleness {staleness}"
    yield Row(f"simulated, {name}", ours, ideal, "steps/s", ours / ideal, f"≥ {GOAL:g}", ours / ideal >= GOAL)
    if last.shards_s:
        busiest = max(now - then for now, then in zip(last.shards_s, first.shards_s, strict=True))
        share = busiest / (last.at - first.at)
        yield Row(f"busiest of {len(last.shards_s)} shards, {name}", share, 1.0, "", share, "–", None)
    spent = last.busy_s - first.busy_s
    share, goal = spent / (last.at - first.at), f"< {BUSY_GOAL:g}" if engines == max(ENGINES) else "–"
    each = 1e3 * spent / (steps * GROUPS * engines)
    yield Row(
        f"coordinator's busy share, {name}", share, 1.0, "", share, goal, share < BUSY_GOAL if goal != "–" else None
    )
    yield Row(f"coordinator's time for a group, {name}", each, None, "ms", each, "–", None)


def balanced() -> Iterator[Row]:
    """Samples per second with the step size that `balance: auto` chose, compared with the best of `SIZES`."""
    load, staleness = Load(slots=SLOTS, median_s=QUICK_MEDIAN_S, mean_tokens=TOKENS), 1
    each = TRAINING_SHARE * GROUP_SIZE * load.median_s * load.mean() / SLOTS / BALANCED_ENGINES

    def rate(prompts: int) -> float:
        marks = run(BALANCED_ENGINES, prompts, staleness, 4 + WARM_UP, load, 0.0, training_each=each)
        return 4 * prompts * GROUP_SIZE / (marks[-1].at - marks[WARM_UP - 1].at)

    auto = {"balance": "auto", "balance_prompts": [SIZES[0], SIZES[-1]], "steps": BALANCED_STEPS}
    chosen = run(BALANCED_ENGINES, SIZES[0], staleness, BALANCED_STEPS, load, 0.0, training_each=each, settings=auto)[
        -1
    ].prompts
    rates = {prompts: rate(prompts) for prompts in SIZES}
    ours, best = rate(chosen), max(rates.values())
    print(", ".join(f"{prompts} prompts: {found:.1f} samples/s" for prompts, found in rates.items()), file=sys.stderr)
    name = f"balance: auto, {chosen} prompts a step after {BALANCED_STEPS} steps, vs the best of a grid"
    yield Row(name, ours, best, "samples/s", ours / best, f"≥ {BALANCED_GOAL:g}", ours / best >= BALANCED_GOAL)


def memory(steps: int) -> Iterator[Row]:
    """Growth of the coordinator's memory after a warm-up, and the object store's bytes at the end."""
    load, staleness = Load(slots=SLOTS, median_s=0.0, mean_tokens=TOKENS), 1
    marks = run(1, 1, staleness, steps, load, training=0.0)
    early, late = marks[steps // 10].resident / 2**20, marks[-1].resident / 2**20
    name, flat = f"after {steps:,} simulated steps", late <= 1.05 * early
    yield Row(f"coordinator {name} vs step {steps // 10:,}", late, early, "MiB", late / early, "≤ 1.05", flat)
    held, most = marks[-1].stored / 2**20, (staleness + 3) * GROUP_BYTES / 2**20
    yield Row(f"object store {name} vs its limit", held, most, "MiB", held / most, "≤ 1", held <= most)


@dataclass(frozen=True)
class Mark:
    """Measurements at the end of a step."""

    at: float
    """Monotonic time."""
    busy_s: float
    """The coordinator's processor time so far."""
    shards_s: list[float]
    """Processor time of each shard so far."""
    resident: int
    """The coordinator's resident bytes."""
    stored: float
    """Bytes in the object store."""
    prompts: int
    """Prompts of the step."""


def run(
    engines: int,
    prompts: int,
    staleness: int,
    steps: int,
    load: Load,
    training: float,
    training_each: float = 0.0,
    settings: dict[str, Any] | None = None,
) -> list[Mark]:
    """Act as the learner for `steps` steps; more steps are begun, so that the last is not the run's last.

    Args:
        training: seconds of a step.
        training_each: additional seconds for each of its prompts.
        settings: further settings of `grpo`.
    """
    plan = plan_of(engines, prompts, staleness, steps + staleness + 1)
    plan["settings"] |= settings or {}
    simulated = Engines(engines, load)
    actor = ray.remote(_Coordinator).options(num_cpus=0, max_concurrency=1000)
    coordinator = actor.remote(plan, simulated, None, SleepingRewards)
    publisher, sender = Publisher(coordinator, "object_store"), PolicySender("{}")
    parameters = {"m.lora_A.weight": torch.zeros(ELEMENTS)}
    ray.get(coordinator.start.remote())
    process, *shards = map(psutil.Process, ray.get(coordinator.pids.remote()))
    publisher.publish(sender.policy(0, parameters), [])
    marks = []
    for step in range(steps):
        share, samples = fetch(coordinator, step, 0, 1)
        time.sleep(training + training_each * len(share.prompts))
        publisher.wait()
        del samples
        publisher.publish(sender.policy(step + 1, parameters), [])
        held = stored() if step in (0, steps - 1) else 0.0
        busy, resident = busy_seconds(process), process.memory_info().rss
        marks.append(Mark(time.monotonic(), busy, list(map(busy_seconds, shards)), resident, held, len(share.prompts)))
    ray.kill(coordinator)  # this also ends its reward workers
    simulated.stop()
    return marks


def busy_seconds(process: psutil.Process) -> float:
    """Processor time of all its threads so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def stored() -> float:
    """Bytes in the object store now."""
    name = "object_store_memory"
    return float(ray.cluster_resources()[name] - ray.available_resources().get(name, 0.0))


def plan_of(engines: int, prompts: int, staleness: int, steps: int) -> dict[str, Any]:
    """A coordinator's plan."""
    settings = {
        "rollout_actors": engines,
        "prompts_per_step": prompts,
        "group_size": GROUP_SIZE,
        "rollout_engine": {"max_num_seqs": SLOTS},
        "max_staleness": staleness,
        "refill_limit": 0,
        "reward_workers": max(2, engines // ENGINES_EACH),
    }
    row = {"prompt": "Say a number.", "response": "7", "answer": "7", "prompt_ids": list(range(PROMPT_TOKENS))}
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


class _Coordinator(Coordinator):
    """Reports its processes."""

    async def pids(self) -> list[int]:
        """Its own process, then each shard's."""
        shards = self._sampler._actors if isinstance(self._sampler, Shards) else []
        return [os.getpid(), *[await shard.__ray_call__.remote(lambda _: os.getpid()) for shard in shards]]


if __name__ == "__main__":
    main()
