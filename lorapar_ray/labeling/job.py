"""Stage `label`: teachers on Ray Serve, questions through Ray Data, every row in labels or rejects exactly once.

Questions are cut into fixed blocks. A block whose votes are on disk is never asked again, so an interruption costs at
most the blocks in flight.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import Row, iterate_rows
from lorapar_ray.errors import UserError
from lorapar_ray.labeling.asker import Asker, read_votes, write_table
from lorapar_ray.labeling.prompts import CONTENT_FREE
from lorapar_ray.labeling.summary import render, summarise
from lorapar_ray.labeling.votes import Vote, average_log_probs, majority
from lorapar_ray.progress import console, progress
from lorapar_ray.runs import RunDirectory, atomic_path, write_json

BATCH_CALIBRATION_ROWS = 48


def label(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Write `labels/part-00000.parquet`, `labels/summary.json` and, if any, `rejects/label.parquet`.

    Raises:
        UserError: fewer teachers than `label.quorum` answer; what was voted so far is kept.
    """
    rows = list(iterate_rows(run.data / "train.parquet"))
    if config.label.strategy == "random":
        votes: dict[str, list[dict[str, Any]]] = {}
        bias: dict[str, list[float]] = {}
        seconds = 0.0
    else:
        start = time.monotonic()
        votes, bias = _collect(config, run, rows)
        seconds = time.monotonic() - start
    labels, rejects = [], []
    for row in rows:
        found = [Vote(**vote) for vote in votes.get(row.id, [])]
        system, agreement, confidence = _random_system(config, row), 1.0, 1.0
        if config.label.strategy != "random":
            decision = majority(found)
            if decision is None:
                rejects.append(_reject(row))
                continue
            system, agreement, confidence = decision.system, decision.agreement, decision.confidence
        decided = {"system": system, "agreement": agreement, "confidence": confidence}
        labels.append({**vars(row), **decided, "votes": [vars(vote) for vote in found]})
    if not labels:
        raise UserError("label: no question got a single vote; look at the teachers with --verbose")
    if rejects:
        with atomic_path(run.rejects / "label.parquet") as draft:
            write_table(draft, rejects)
    with atomic_path(run.labels / "part-00000.parquet") as draft:
        write_table(draft, labels)
    summary = summarise(config.label, labels, len(rejects), bias, seconds)
    write_json(run.labels / "summary.json", summary)
    console.print(render(summary))
    return {"labelled": len(labels), "unlabelled": len(rejects)}


def _collect(
    config: Config, run: RunDirectory, rows: list[Row]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[float]]]:
    """(votes by row id, bias by teacher); asks whatever is not on disk yet."""
    work = run.work / "label"
    size = config.label.rows_per_block
    stems = [work / f"block-{index:05d}" for index in range(-(-len(rows) // size))]
    for index, stem in enumerate(stems):
        if not stem.with_suffix(".json").is_file():
            part = rows[index * size : (index + 1) * size]
            write_json(stem.with_suffix(".json"), [vars(row) for row in part])
    bias_file = work / "bias.json"
    pending = [stem for stem in stems if not Path(f"{stem}.votes.json").is_file()]
    if pending:
        _ask_pending(config, rows, pending, len(stems), bias_file)
    votes = {entry["id"]: entry["votes"] for stem in stems for entry in read_votes(stem)}
    return votes, json.loads(bias_file.read_text())


def _ask_pending(config: Config, rows: list[Row], pending: list[Path], total: int, bias_file: Path) -> None:
    apps = {t.name: f"lorapar-{config.name}-{t.name}" for t in config.label.teachers if t.kind == "serve"}

    def poll() -> tuple[int, str]:
        left = sum(not Path(f"{stem}.votes.json").is_file() for stem in pending)
        return total - left, "blocks" if bias_file.is_file() else "blocks, starting teachers"

    try:
        with progress("label", total, poll):
            running = _start_teachers(config, apps)
            asker = Asker(config.label.model_dump(mode="json"), running, _student(config), {})
            bias = asyncio.run(_measure(config, asker, rows))
            if not bias_file.is_file():  # one run, one calibration: a resumed run goes on with the first
                write_json(bias_file, bias)
            _run_job(config, running, pending, json.loads(bias_file.read_text()))
    finally:
        if apps:
            _stop_teachers(apps)
    missing = [stem for stem in pending if not Path(f"{stem}.votes.json").is_file()]
    if missing:
        raise UserError(f"label: {len(missing)} blocks of questions got no answer; run the same command to ask again")


def _start_teachers(config: Config, apps: dict[str, str]) -> dict[str, str]:
    """Deploy every hosted teacher, all at once, and wait until each runs or has failed; returns those that run.

    Raises:
        UserError: fewer than the quorum run.
    """
    if not apps:
        return {}
    from ray import serve
    from ray.serve.config import HTTPOptions

    from lorapar_ray.labeling.teachers import target
    from lorapar_ray.models import resolve_model
    from lorapar_ray.workers import require

    hosted = [teacher for teacher in config.label.teachers if teacher.kind == "serve"]
    for teacher in hosted:
        resolve_model(teacher.model)  # a wrong path should be one line here, not a replica that never starts
        require("label", teacher.replicas, teacher.resources)
    logging.getLogger("ray.serve").setLevel(logging.getLogger("ray").getEffectiveLevel())  # its own default is INFO
    serve.start(http_options=HTTPOptions(host="127.0.0.1", location="NoServer"))
    targets = [target(teacher, apps[teacher.name], config.seed) for teacher in hosted]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    waiting, running = dict(apps), {}
    while waiting:
        status = serve.status().applications
        for name, app in list(waiting.items()):
            state = status[app].status if app in status else None
            if state == "RUNNING":
                running[name] = waiting.pop(name)
            elif state in ("DEPLOY_FAILED", "UNHEALTHY"):
                console.print(f"  [yellow]teacher {name} could not start and abstains[/]: {status[app].message[:300]}")
                waiting.pop(name)
        time.sleep(0.5)
    remote = len(config.label.teachers) - len(hosted)
    if len(running) + remote < config.label.quorum:
        raise UserError(
            f"label: {len(running) + remote} of {len(config.label.teachers)} teachers run, label.quorum is "
            f"{config.label.quorum}; see --verbose, then run the same command again"
        )
    return running


def _stop_teachers(apps: dict[str, str]) -> None:
    """Free the teachers' resources; Serve itself stays if somebody else's applications run on it."""
    from ray import serve

    if set(serve.status().applications) <= set(apps.values()):
        serve.shutdown()
        return
    for app in apps.values():
        serve.delete(app)


async def _measure(config: Config, asker: Asker, rows: list[Row]) -> dict[str, list[float]]:
    """Check that the quorum answers, and measure each teacher's bias as `label.calibration` says."""
    probes = [(text, "N/A") for text in CONTENT_FREE]
    if config.label.calibration == "batch":
        sample = random.Random(f"{config.seed}/bias").sample(rows, min(len(rows), BATCH_CALIBRATION_ROWS))
        probes = [(row.prompt, row.answer) for row in sample]
    bias: dict[str, list[float]] = {}
    answering = 0
    for teacher in config.label.teachers:
        asked = await asyncio.gather(*(asker.log_probs(teacher, *probe) for probe in probes))
        answers = [answer for answer in asked if answer is not None]
        answering += bool(answers)
        if not answers:
            console.print(f"  [yellow]teacher {teacher.name} does not answer and abstains[/]")
        elif config.label.calibration == "batch":
            bias[teacher.name] = [median(column) for column in zip(*answers, strict=True)]
        elif config.label.calibration == "content_free":
            bias[teacher.name] = average_log_probs(answers)
    if answering < config.label.quorum:
        raise UserError(
            f"label: {answering} of {len(config.label.teachers)} teachers answer, label.quorum is "
            f"{config.label.quorum}; mend them and run the same command again"
        )
    return bias


def _run_job(config: Config, apps: dict[str, str], pending: list[Path], bias: dict[str, list[float]]) -> None:
    """Ask the pending blocks through Ray Data."""
    import ray

    from lorapar_ray.workers import require

    settings = config.label
    require("label", settings.workers, settings.resources)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts blocks on disk, which survive a restart
    # Ray Data takes CPUs that Serve holds for its own and waits for them for ever, unless told what it may use
    limits = {"cpu": settings.workers * settings.resources.cpus + 1, "object_store_memory": 256 * 2**20}
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(**limits)
    blocks = ray.data.from_items([{"block": str(stem.resolve())} for stem in pending], override_num_blocks=len(pending))
    blocks.map_batches(
        Asker,
        fn_constructor_args=(settings.model_dump(mode="json"), apps, _student(config), bias),
        batch_size=1,
        concurrency=settings.workers,
        num_cpus=settings.resources.cpus,
    ).materialize()


def _student(config: Config) -> str:
    return config.label.student_name or config.model.path.removeprefix("package:").rstrip("/").rsplit("/", 1)[-1]


def _random_system(config: Config, row: Row) -> int:
    """A seeded draw that depends on the row's id alone."""
    systems = sorted(config.label.definitions)
    number = hashlib.sha256(f"{config.seed}/{row.id}".encode()).digest()[0]
    return systems[number % len(systems)]


def _reject(row: Row) -> dict[str, str]:
    text = json.dumps(vars(row), ensure_ascii=False)
    return {"id": row.id, "stage": "label", "reason": "no teacher answered", "row": text}
