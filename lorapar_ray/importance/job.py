"""Stage `score` on Ray Train: every LoRA element's importance for each System.

One group of workers takes the warm-up's steps and then sums gradients; each keeps running sums (`importance.parts`)
and checkpoints them regularly. The distribution of examples over workers and batches changes only the order of float32
additions: within a batch the order of its examples, longest first; then batches, then files by their first units. No
row is dropped to give workers equal numbers of rows: workers share nothing, or (`score.sharding: fsdp2`) only the base.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.datasets.labelled import require_room, token_table
from lorapar_ray.datasets.tokens import Selection, TokenTable, key_of
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path, digest
from lorapar_ray.importance.halves import Halves, half_scores, halves_of_parts, save_halves
from lorapar_ray.importance.parts import Plan, done_units, settled, sums_of
from lorapar_ray.importance.sums import GradSums
from lorapar_ray.importance.units import finished_units
from lorapar_ray.importance.worker import ScoreJob, score_worker
from lorapar_ray.progress import progress
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.job import steps_done
from lorapar_ray.sft.worker import SftJob
from lorapar_ray.student import base_reference
from lorapar_ray.tracking import notices_of
from lorapar_ray.workers import run_workers

ROUNDS = 3
"""How often units that are missing from the sums after a group has ended are dealt again."""


def score_stage(config: Config, run: RunDirectory, initial: Path | None = None) -> dict[str, Any]:
    """Score `adapter/` for each System; writes `scores/`.

    Args:
        initial: an adapter to warm up first, which makes `adapter/`; None: `adapter/` exists.

    Raises:
        UserError: a System without rows, or a score that is zero everywhere.
    """
    tokens = token_table(config, run)
    samples = samples_of(config, tokens)
    table = TokenTable(tokens)
    every = list(samples.values())
    counts = require_room(run, table, every, stage="score", field="score.max_length")
    fields = {str(system): asdict(chosen) for system, chosen in samples.items()}
    what = [key_of(tokens), {k: {**v, "path": ""} for k, v in fields.items()}]
    folder, unit_size = settled(
        lambda size: run.work / "score" / f"sums-{digest([*what, size])[:12]}", config.score.unit_size
    )
    plan = Plan(dict(zip(samples, counts, strict=True)), unit_size)
    warm_up = None if initial is None else _warm_up(config, run, initial, samples)
    job = ScoreJob(
        model=config.model.model_dump(mode="json"),
        score={**config.score.model_dump(mode="json"), "unit_size": unit_size},
        base=base_reference(config.model, run),
        adapter=str(run.adapter.resolve()),
        samples=fields,
        sums=str(folder.resolve()),
        phase=str((run.work / "score" / "phase").resolve()),
        warm_up=None if warm_up is None else warm_up.payload(),
    )
    for _ in range(ROUNDS):
        if _left(plan, folder) == 0 and warm_up is None:
            break
        _run(config, run, job, plan, folder)
        warm_up = None
    if left := _left(plan, folder):
        raise UserError(
            f"score: {left} units of work are missing from the sums in '{folder}'; run the same command again"
        )
    if job.warm_up is not None:
        shutil.rmtree(job.warm_up["checkpoints"], ignore_errors=True)
    for system in samples:
        _write_scores(config, run, system, plan, folder)
    halves = halves_of_parts(folder, plan, _scoring(config, run))
    save_halves(run.scores / "halves", halves if len(samples) == 2 else deque(halves, maxlen=1))
    return {f"system{system}_examples": plan.examples[system] for system in samples}


def samples_of(config: Config, tokens: Path) -> dict[int, Selection]:
    """The seeded sample of each System's rows that is scored."""
    score = config.score
    return {
        system: Selection(
            str(tokens.resolve()), [system], "score", score.max_length, score.examples_per_system, True, config.seed
        )
        for system in config.scored
    }


def _warm_up(config: Config, run: RunDirectory, initial: Path, samples: dict[int, Selection]) -> SftJob:
    """The warm-up on the samples of all Systems."""
    from dataclasses import replace

    from lorapar_ray.sft.job import warm_up_job

    return warm_up_job(config, run, initial, replace(next(iter(samples.values())), systems=list(samples)))


def _left(plan: Plan, folder: Path) -> int:
    return sum(len(set(units) - done_units(folder, part)) for part, units in plan.parts())


def _run(config: Config, run: RunDirectory, job: ScoreJob, plan: Plan, folder: Path) -> None:
    phase, every = Path(job.phase), sum(plan.units(system) for system in plan.examples)
    phase.unlink(missing_ok=True)

    def poll() -> tuple[int, str]:
        saying = phase.read_text(encoding="utf-8") if phase.is_file() else "starting workers"
        if saying == "warm-up" and job.warm_up is not None:
            done, remark = steps_done(job.warm_up["metrics"])
            return 0, f"warm-up step {done} · {remark}" if done else "warm-up"
        return every - _left(plan, folder), saying

    notices = [] if job.warm_up is None else [notices_of(job.warm_up["metrics"])]
    with progress("score", every, poll, notices):
        run_workers(
            score_worker,
            job.payload(),
            name="score",
            workers=config.score.workers,
            max_workers=config.score.max_workers,
            resources=config.score.resources,
            run=run,
            writes=[run.work / "score", run.work / "warmup", run.adapter, run.metrics],
        )


def halves_of_units(config: Config, run: RunDirectory) -> Iterator[Halves]:
    """Scores of the halves of each System's units of work, from runs of versions without running sums."""
    units1, units2 = (finished_units(run, system) for system in (1, 2))
    return half_scores(units1, units2, _scoring(config, run))


def _scoring(config: Config, run: RunDirectory) -> Any:
    from lorapar_ray.adapters import read_adapter_state
    from lorapar_ray.importance import score

    phi = read_adapter_state(run.adapter)

    def half_score(sums: GradSums, number: int) -> dict[str, Any]:
        return score(config.score.criterion, phi, sums, seed=config.seed + 1 + number)

    return half_score


def _write_scores(config: Config, run: RunDirectory, system: int, plan: Plan, folder: Path) -> None:
    from safetensors.torch import save_file

    from lorapar_ray.adapters import read_adapter_state
    from lorapar_ray.importance import score

    sums = sums_of(folder, [part for part, _ in plan.parts() if part.system == system])
    assert sums is not None and sums.n == plan.examples[system]
    try:
        scores = score(config.score.criterion, read_adapter_state(run.adapter), sums, seed=config.seed)
    except UserError as error:
        raise UserError(f"System {system}: {error}") from error
    with atomic_path(run.scores / f"system{system}.safetensors") as draft:
        save_file(scores, draft, metadata={"criterion": config.score.criterion})
