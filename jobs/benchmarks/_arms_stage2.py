"""Stage 2 of several arms together, compared with the same arms one after the other (for `arms.py`)."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _rows import Row
from _stage2_run import SIZES, prepare

from lorapar_ray.adapters.job import make_adapter
from lorapar_ray.config import Config
from lorapar_ray.grpo.job import train_stage2
from lorapar_ray.grpo.together import train_together
from lorapar_ray.runs import RunDirectory
from lorapar_ray.session import ray_session

Member = tuple[Config, RunDirectory]


def stage2_rows(arms: int, device: str, steps: int, goal: float, alone: int) -> list[Row]:
    """Arms and arm-steps per hour.

    Args:
        steps: of each arm; the first is left out of the time of a step.
        alone: arms that train one after the other; their mean stands for all.
    """
    with TemporaryDirectory() as folder, ray_session():
        members = [ready(Path(folder) / str(arm), arm, device, steps) for arm in range(arms)]
        ours = seconds(lambda: train_together(members))
        our_step = statistics.median(step(run) for _, run in members)
        others = [ready(Path(folder) / f"alone-{arm}", arm, device, steps) for arm in range(alone)]
        theirs = sum(seconds(lambda each=each: train_stage2(*each)) for each in others) / alone  # type: ignore[misc]
        their_step = statistics.mean(step(run) for _, run in others)
    return [
        row(f"stage 2, {arms} arms: arms per hour, {steps} steps with all starts", arms, ours, theirs, goal),
        row(f"stage 2, {arms} arms: arm-steps per hour", arms, our_step, their_step, goal),
    ]


def ready(folder: Path, arm: int, device: str, steps: int) -> Member:
    """A run that has reached stage 2, with an adapter and a learning rate of its own."""
    folder.mkdir()
    config, run = prepare("package:smollm2-135m-instruct", steps, folder / "run", SIZES[device])
    grpo = config.grpo.model_copy(update={"learning_rate": config.grpo.learning_rate * (1 + arm)})
    config = config.model_copy(update={"seed": arm, "order": ["grpo"], "grpo": grpo})
    make_adapter(config, run, run.adapter)
    return config, run


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step(run: RunDirectory) -> float:
    """Median seconds of a run's step, without the first."""
    lines: Sequence[dict[str, Any]] = list(map(json.loads, (run.metrics / "grpo.jsonl").read_text().splitlines()))
    return statistics.median(line["seconds"] for line in lines[1:])


def row(name: str, arms: int, ours: float, theirs: float, goal: float) -> Row:
    ratio = arms * theirs / ours
    told, met = (f"≥ {goal:g}", ratio >= goal) if arms == 4 else ("–", None)
    return Row(name, 3600 * arms / ours, 3600 / theirs, "1/h", ratio, told, met)
