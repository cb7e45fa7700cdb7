"""Labels and rejects from stored answers, streamed: reads a row at a time, writes a chunk at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import ROW_SCHEMA, ROWS_PER_WRITE, SYSTEM, Row, as_record, iterate_rows
from lorapar_ray.datasets.tables import TableWriter, reject, reject_table
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path
from lorapar_ray.labeling.pending import answered_rows
from lorapar_ray.labeling.store import Answer, VoteStore, question_key
from lorapar_ray.labeling.summary import Session, Tally
from lorapar_ray.labeling.votes import Decision, Vote, majority
from lorapar_ray.labeling.voting import Keys, votes_of
from lorapar_ray.runs import RunDirectory

LABELS = "part-00000.parquet"
VOTE = pa.struct(
    [("teacher", pa.string()), ("system", pa.int64()), ("confidence", pa.float64()), ("latency_s", pa.float64())]
)
LABEL_SCHEMA = pa.schema(
    [
        *ROW_SCHEMA,
        SYSTEM,
        ("agreement", pa.float64()),
        ("confidence", pa.float64()),
        ("votes", pa.list_(VOTE)),
    ]
)


def write_labels(
    config: Config, run: RunDirectory, store: VoteStore, keys: Keys, bias: Mapping[str, list[float]], session: Session
) -> dict[str, Any]:
    """Decide every question by its stored votes; returns the summary.

    Raises:
        UserError: no question has a vote.
    """
    tally = Tally(config.label, bias, config.seed, session.run)
    with _tables(run) as (labels, rejects):
        for chunk, found in answered_rows(run.data / "train.parquet", store, ROWS_PER_WRITE):
            questions = [question_key(row.prompt, row.answer) for row in chunk]
            failures = store.failures(session.run, questions)
            for row, question, known in zip(chunk, questions, found, strict=True):
                votes = votes_of(config.label, keys, known, bias)
                voted = {vote.teacher for vote in votes}
                failed = {name: why for name, why in failures.get(question, {}).items() if name not in voted}
                decision = majority(votes, config.label.weights)
                if decision is None:
                    rejects.add(reject(row, "label", f"no teacher answered ({_why(failed)})"))
                    tally.abstain(failed)
                else:
                    labels.add(_labelled(row, decision, votes))
                    tally.add(row, decision.system, votes, _by_teacher(keys, known), failed)
        if not labels.count:
            raise UserError("label: no question got a vote; check the teachers with --verbose")
        return tally.summary(rejects.count, session)


def write_random_labels(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Strategy `random`: a seeded draw for every question."""
    return _write_without_votes(config, run, lambda row: random_system(config, row))


def write_labels_of_sources(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Strategy `source`: the System of each question's source.

    Raises:
        UserError: a System has no question left, since all were duplicates or test questions.
    """
    return _write_without_votes(config, run, _given_system, every_system=True)


def _given_system(row: Row) -> int:
    assert row.system is not None, "the config gives every source of data.train a System"
    return row.system


def _write_without_votes(
    config: Config, run: RunDirectory, system_of: Callable[[Row], int], *, every_system: bool = False
) -> dict[str, Any]:
    tally = Tally(config.label, {}, config.seed)
    with _tables(run) as (labels, _):
        for row in iterate_rows(run.data / "train.parquet"):
            decision = Decision(system_of(row), 1.0, 1.0)
            labels.add(_labelled(row, decision, []))
            tally.add(row, decision.system, [], {})
        summary = tally.summary(0, Session())
        if every_system and (empty := [system for system, count in summary["split"].items() if not count]):
            raise UserError(
                f"data.train: no row of System {empty[0]} is left, all are duplicates or also in data.test; see "
                "rejects/prepare.parquet"
            )
        return summary


def random_system(config: Config, row: Row) -> int:
    """A seeded draw that depends only on the row's id."""
    number = hashlib.sha256(f"{config.seed}/{row.id}".encode()).digest()[0]
    return sorted(config.label.definitions)[number % len(config.label.definitions)]


def _by_teacher(keys: Keys, known: Mapping[bytes, Answer]) -> dict[str, list[Answer]]:
    return {name: [known[key] for key in own] for name, own in keys.items() if all(key in known for key in own)}


def _labelled(row: Row, decision: Decision, votes: list[Vote]) -> dict[str, Any]:
    return {**as_record(row), **vars(decision), "votes": [vars(vote) for vote in votes]}


def _why(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{teacher}: {reason}" for teacher, reason in reasons.items()) or "none was asked"


@contextmanager
def _tables(run: RunDirectory) -> Iterator[tuple[TableWriter, TableWriter]]:
    """The tables of labels and rejects; both are written when the block ends without an error, the rejects only if
    there are any."""
    with (
        atomic_path(run.labels / LABELS) as draft,
        reject_table(run.rejects / "label.parquet") as rejects,
    ):
        labels = TableWriter(draft, LABEL_SCHEMA)
        yield labels, rejects
        labels.close()
