"""Stage `label`: teachers asked through Ray Data, every row in labels or rejects exactly once.

    data/train.parquet ─► pending questions ─► asking workers (Ray Data) ─► vote store ─► labels, rejects, summary
                              ▲                    └─► Serve, endpoints         │
                              └──────────── what is known already ◄─────────────┘

Everything streams: driver and workers hold only a few blocks of questions. A resumed run, a new teacher or another
calibration continues from the vote store.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from lorapar_ray.boundary import read_object
from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import count_rows
from lorapar_ray.errors import UserError
from lorapar_ray.files import expanded, write_json
from lorapar_ray.labeling.asker import asked, read_result
from lorapar_ray.labeling.calibration import ask_probes, measured_bias, probes, unanswered
from lorapar_ray.labeling.journal import is_networked, segments
from lorapar_ray.labeling.keys import teacher_keys
from lorapar_ray.labeling.output import LABELS, write_labels, write_labels_of_sources, write_random_labels
from lorapar_ray.labeling.panel import Panel, reasons
from lorapar_ray.labeling.pending import write_pending
from lorapar_ray.labeling.secrets import secrets, warn_of_plain_http
from lorapar_ray.labeling.serving import room_for_teachers, start_teachers, stop_teachers
from lorapar_ray.labeling.shuffled import shuffle_labels
from lorapar_ray.labeling.store import VoteStore as VoteStore  # re-exported: a benchmark times it
from lorapar_ray.labeling.summary import Session, render
from lorapar_ray.labeling.teachers import python_class
from lorapar_ray.labeling.voting import Keys
from lorapar_ray.progress import console, progress
from lorapar_ray.redact import redacted
from lorapar_ray.runs import RunDirectory
from lorapar_ray.text import markup

DELETE = "delete it and run the same command again; votes are kept"
OBJECT_STORE_BYTES = 256 * 2**20


def label(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Write `labels/part-00000.parquet`, `metrics/labels.json` and, if any, `rejects/label.parquet`.

    Raises:
        UserError: fewer teachers than `label.quorum` answer; what was voted so far is kept. Or, with strategy `source`,
            a System without questions.
    """
    if config.label.strategy == "random":
        summary = write_random_labels(config, run)
    elif config.label.strategy == "source":
        summary = write_labels_of_sources(config, run)
    else:
        voting = _Voting(config, run)
        try:
            voting.collect()
            summary = write_labels(config, run, voting.store, voting.keys, voting.bias, voting.session)
        finally:
            voting.store.close()
        if config.label.shuffled:
            shuffle_labels(run.labels / LABELS, config.seed)
            console.print("  a control: the labels are shuffled among the questions")
    summary = redacted(summary)
    write_json(run.label_summary, summary)
    console.print(render(summary), markup=True)
    return {"labelled": summary["rows"], "unlabelled": summary["rejected"]}


def student_name(config: Config) -> str:
    """Name of the model that teachers play: from the config, else the last part of the student's path."""
    return config.label.student_name or config.model.path.removeprefix("package:").rstrip("/").rsplit("/", 1)[-1]


@dataclass
class _Voting:
    """One process's part in collecting the votes of a run."""

    config: Config
    run: RunDirectory
    bias: dict[str, list[float]] = field(default_factory=dict)
    left: int = 0
    """Questions that still wait for a vote."""

    def __post_init__(self) -> None:
        label = self.config.label
        for teacher in label.teachers:
            if teacher.kind == "python":
                python_class(teacher)
        self.student = student_name(self.config)
        self.secrets = secrets(label.teachers)
        warn_of_plain_http(label.teachers, self.secrets)
        prints = self.run.fingerprints
        self.keys: Keys = {t.name: teacher_keys(label, t, self.student, prints) for t in label.teachers}
        self.rows = self.run.data / "train.parquet"
        self.work = self.run.work / "label"
        self.total = count_rows(self.rows)
        self.store = _store(self.config, self.run)
        self.session = Session(run=_run_id(self.work / "run.json"))
        self.probes = probes(label, self.rows, self.config.seed)

    def collect(self) -> None:
        """Ask for answers that are not stored yet."""
        label = self.config.label
        if not any(unanswered(label, self.keys, self.store, self.probes).values()):
            self._calibrate()
            if not self._pending([teacher.name for teacher in label.teachers]).blocks:
                return  # every vote is stored: no teacher needs to start
        with room_for_teachers(self.config):
            self._ask()

    def _ask(self) -> None:
        label = self.config.label
        start = time.monotonic()
        try:
            ready: list[str] = []
            with progress("teachers", len(label.teachers), lambda: (len(ready), "starting and calibrating")):
                apps, dead = start_teachers(self.config)
                dead |= asyncio.run(self._ask_probes(apps, dead, ready))
            self._check_quorum(dead)
            self._calibrate()
            self.session.starting_s = time.monotonic() - start
            pending = self._pending([name for name in self.keys if name not in dead])
            self.left = pending.questions
            after = " after calibration" if self.probes else ""  # which may have asked for some or all of them
            with progress("label", self.total, lambda: (self.total - self.left, f"{self.session.votes} votes{after}")):
                asking = time.monotonic()
                for result in self._results(pending.blocks, apps, dead):
                    self._absorb(result)
                    self._check_quorum(result["dead"])
                self.session.asking_s = time.monotonic() - asking
        finally:
            stop_teachers(self.config)

    def _pending(self, living: list[str]) -> Any:
        target = self.work / "pending.parquet"
        return write_pending(target, self.rows, self.store, self.config.label, self.keys, self.bias, living)

    async def _ask_probes(self, apps: dict[str, str], dead: dict[str, str], ready: list[str]) -> dict[str, str]:
        label = self.config.label
        panel = Panel(label, apps, self.secrets, self.student, self.session.run, dead)
        silent = await ask_probes(panel, label, self.keys, self.store, self.probes, ready)
        for name, reason in silent.items():
            if name not in dead:
                console.print(
                    f"  [yellow]teacher {name} does not answer and abstains[/]: {markup(reason)}", markup=True
                )
        return silent

    def _check_quorum(self, dead: dict[str, str]) -> None:
        self.session.dead |= dead
        label = self.config.label
        living = len(label.teachers) - len(dead)
        if living < label.quorum:
            raise UserError(
                f"label: {living} of {len(label.teachers)} teachers answer, label.quorum is {label.quorum} "
                f"({reasons(dead)}); fix them and run the same command again, votes so far are kept"
            )

    def _calibrate(self) -> None:
        """One calibration per run: a resumed run keeps it, and adds teachers that answer only now."""
        file = self.work / "bias.json"
        known = _known_bias(file, len(self.config.label.definitions)) if file.is_file() else {}
        self.bias = measured_bias(self.config.label, self.keys, self.store, self.probes) | known
        write_json(file, self.bias)

    def _absorb(self, result: Any) -> None:
        self.store.add(
            (
                (question, key, answer)
                for question, name, answers in result["answers"]
                for key, answer in zip(self.keys[name], answers, strict=True)
            ),
            ((self.session.run, question, name, reason) for question, name, reason in result["failures"]),
        )
        self.session.votes += len(result["answers"])
        self.left -= result["questions"]

    def _results(self, blocks: int, apps: dict[str, str], dead: dict[str, str]) -> Iterator[Any]:
        """Ask the pending blocks through Ray Data; results come in the order in which they are finished."""
        if not blocks:
            return
        from ray.data import DataContext

        label = self.config.label
        context = DataContext.get_current()
        context.enable_progress_bars = False  # ours counts stored questions, which survive a restart
        context.execution_options.preserve_order = False
        # without limits Ray Data counts CPUs that Serve holds as its own and waits for them forever
        limits = {"cpu": label.workers * label.resources.cpus + 1, "object_store_memory": OBJECT_STORE_BYTES}
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(**limits)
        arguments = {
            "pending": self.run.address(self.work / "pending.parquet"),
            "apps": apps,
            "keys": self.secrets,
            "student": self.student,
            "bias": self.bias,
            "run": self.session.run,
            "dead": dead,
        }
        results = asked(blocks, label, arguments)
        with self.run.shared():
            for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
                for text in batch["result"]:
                    yield read_result(text)


def _store(config: Config, run: RunDirectory) -> VoteStore:
    """The run's votes, or those that `label.cache` names: SQLite on a disk of this machine, else a journal.

    A journal that has begun goes on wherever it is now, with the votes of a file beside it.
    """
    file, journal = run.work / "votes.sqlite", run.work / "votes"
    if config.label.cache:
        file = expanded(config.label.cache, "label.cache").absolute()
        journal = file.with_name(f"{file.name}.journal")
    elif run.remote is not None:
        return VoteStore(file, journal)
    return VoteStore(file, journal if segments(journal) or is_networked(file.parent) else None)


def _run_id(file: Path) -> str:
    """Names this run's votes in a store that others may share; the same for every process that resumes it."""
    if not file.is_file():
        write_json(file, {"run": uuid4().hex})
    run = read_object(file, DELETE).get("run")
    if not isinstance(run, str) or not run:
        raise UserError(f"'{file}' names no run; {DELETE}")
    return run


def _known_bias(file: Path, systems: int) -> dict[str, list[float]]:
    """The calibration that an earlier process of this run measured."""
    known = read_object(file, DELETE)
    for name, values in known.items():
        numbers = values if isinstance(values, list) else []
        if len(numbers) != systems or not all(isinstance(v, float | int) and math.isfinite(v) for v in numbers):
            raise UserError(f"'{file}' holds no calibration of teacher '{name}'; {DELETE}")
    return known
