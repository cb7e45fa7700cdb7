"""A vote in numbers: split, agreement of teachers, confidence, speed, price."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import Any

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.datasets.rows import Row
from lorapar_ray.labeling.percentiles import Durations
from lorapar_ray.labeling.store import Answer
from lorapar_ray.labeling.votes import Agreement, Vote, number_bias
from lorapar_ray.text import markup

DISAGREEMENTS_SHOWN = 8
PERCENTILES = (50, 95, 99)
BINS = 10


@dataclass
class Session:
    """Figures of one process: a resumed run has several; speeds are those of the last one."""

    run: str = ""
    """Marks the votes that this run requested, see `Answer.run`."""
    votes: int = 0
    """Number of votes requested and stored."""
    starting_s: float = 0.0
    """Seconds until teachers had started and were calibrated."""
    asking_s: float = 0.0
    dead: dict[str, str] = field(default_factory=dict)
    """Teachers that were given up, and why."""


@dataclass
class _Teacher:
    """Sums over one teacher's votes."""

    split: Counter[int] = field(default_factory=Counter)
    confidence: float = 0.0
    latency: Durations = field(default_factory=Durations)
    tokens: int = 0
    asked_tokens: int = 0
    """Answers that this run asked for; the others came from the cache."""
    cached: int = 0
    abstained: int = 0
    leaning: list[float] = field(default_factory=list)
    """Summed log-probability of each number, over questions asked in every rotation."""


class Tally:
    """Adds up labelled rows one at a time; memory does not grow with them."""

    def __init__(self, label: LabelConfig, bias: Mapping[str, list[float]], seed: int, run: str = "") -> None:
        """Start at zero; `run` tells votes that this run asked for from cached ones (see `Answer.run`)."""
        self._label = label
        self._run = run
        self._bias = bias
        self._systems = sorted(label.definitions)
        self._teachers = {teacher.name: _Teacher() for teacher in label.teachers}
        self._split: Counter[int] = Counter()
        self._tasks: dict[str, Counter[int]] = defaultdict(Counter)
        self._agreement = Agreement()
        self._bins = [0] * BINS
        self._random = random.Random(f"{seed}/disagreements")
        self._disagreeing = 0
        self._disagreements: list[dict[str, Any]] = []

    def add(
        self,
        row: Row,
        system: int,
        votes: Sequence[Vote],
        answers: Mapping[str, Sequence[Answer]],
        failed: Collection[str] = (),
    ) -> None:
        """Count a labelled row.

        Args:
            answers: by teacher, the answers behind its vote.
            failed: teachers that were asked and did not answer.
        """
        self.abstain(failed)
        self._split[system] += 1
        self._tasks[row.task][system] += 1
        for vote in votes:
            self._add_vote(vote, answers[vote.teacher])
        if votes:
            self._agreement.add(votes)
        if len({vote.system for vote in votes}) > 1:
            self._sample(row, system, votes)

    def _add_vote(self, vote: Vote, answers: Sequence[Answer]) -> None:
        teacher = self._teachers[vote.teacher]
        teacher.split[vote.system] += 1
        teacher.confidence += vote.confidence
        low = 1 / len(self._systems)
        self._bins[min(BINS - 1, max(0, floor((vote.confidence - low) / (1 - low) * BINS)))] += 1
        for answer in answers:
            teacher.latency.add(answer.latency_s)
            teacher.tokens += answer.tokens
            teacher.asked_tokens += answer.tokens if answer.run == self._run else 0
        teacher.cached += any(answer.run != self._run for answer in answers)
        if len(answers) > 1:
            own = number_bias([answer.log_probs for answer in answers])
            teacher.leaning = [a + b for a, b in zip(teacher.leaning or [0.0] * len(own), own, strict=True)]

    def abstain(self, failed: Collection[str]) -> None:
        """Count teachers that did not answer a question."""
        for name in failed:
            self._teachers[name].abstained += 1

    def _sample(self, row: Row, system: int, votes: Sequence[Vote]) -> None:
        """Keep an even sample of the disagreements (reservoir sampling)."""
        self._disagreeing += 1
        shown = [vars(vote) for vote in votes]
        entry = {"prompt": row.prompt, "answer": row.answer, "system": system, "votes": shown}
        if len(self._disagreements) < DISAGREEMENTS_SHOWN:
            self._disagreements.append(entry)
        elif (place := self._random.randrange(self._disagreeing)) < DISAGREEMENTS_SHOWN:
            self._disagreements[place] = entry

    def summary(self, rejected: int, session: Session) -> dict[str, Any]:
        """Everything, JSON-ready."""
        label, systems = self._label, self._systems
        rows = self._split.total()
        votes = sum(teacher.split.total() for teacher in self._teachers.values())
        cached = sum(teacher.cached for teacher in self._teachers.values())
        possible = (rows + rejected) * len(self._teachers)
        edges = [round(1 / len(systems) + (1 - 1 / len(systems)) * k / BINS, 4) for k in range(BINS + 1)]
        teachers = {t.name: self._teacher(t, rows + rejected, session) for t in label.teachers}
        silent = [f"teacher {name} was given up: {why}" for name, why in session.dead.items()]
        return {
            "strategy": label.strategy,
            "calibration": label.calibration,
            "weights": label.weights,
            "sequential": label.sequential,
            "rows": rows,
            "rejected": rejected,
            "split": _counts(self._split, systems),
            "teachers": teachers,
            "pairwise_agreement": self._agreement.pairwise(),
            # with sequential voting all teachers vote only if the first ones disagree
            "fleiss_kappa": self._agreement.fleiss_kappa() if votes and not label.sequential else None,
            "confidence_histogram": {"edges": edges, "counts": self._bins},
            "by_task": {name: _counts(split, systems) for name, split in sorted(self._tasks.items())},
            "disagreements": self._disagreements,
            "disagreeing": self._disagreeing,
            "votes": votes,
            "votes_possible": possible,
            "votes_from_cache": cached,
            "votes_asked": votes - cached,
            "tokens": sum(teacher.tokens for teacher in self._teachers.values()),
            "cost": round(sum(teacher["cost"] for teacher in teachers.values()), 4),
            "seconds_starting": round(session.starting_s, 2),
            "seconds": round(session.asking_s, 2),
            "votes_per_second": round(session.votes / session.asking_s, 3) if session.asking_s else None,
            "warnings": [f"no question is labelled System {s}" for s in systems if not self._split[s]] + silent,
        }

    def _teacher(self, teacher: TeacherConfig, questions: int, session: Session) -> dict[str, Any]:
        own = self._teachers[teacher.name]
        cast = own.split.total()
        latency = {f"p{p}": own.latency.percentile(p) for p in PERCENTILES} if cast else {}
        hours = (session.starting_s + session.asking_s) / 3600 * (teacher.replicas if teacher.has_engine else 0)
        return {
            "model": teacher.model,
            "split": _counts(own.split, self._systems),
            "abstained": own.abstained,
            "not_asked": questions - cast - own.abstained,
            "given_up": session.dead.get(teacher.name),
            "bias": self._leaning(teacher.name, own, cast),
            "mean_confidence": round(own.confidence / cast, 4) if cast else None,
            "latency": {name: round(value, 4) for name, value in latency.items() if value is not None},
            "tokens": own.tokens,
            "from_cache": own.cached,
            "cost": round(own.asked_tokens * teacher.cost_per_million_tokens / 1e6 + hours * teacher.cost_per_hour, 4),
        }

    def _leaning(self, name: str, own: _Teacher, cast: int) -> dict[str, float] | None:
        """A teacher's bias towards each label, in log-odds above its mean, which calibration divided out."""
        measured = [value / cast for value in own.leaning] if own.leaning else self._bias.get(name)
        if not measured:
            return None
        mean = sum(measured) / len(measured)
        return {str(system): round(value - mean, 4) for system, value in zip(self._systems, measured, strict=True)}


def render(summary: Mapping[str, Any]) -> str:
    """The summary in a few lines for the console, in `rich` markup."""
    lines = ["  " + ", ".join(f"System {system}: {count}" for system, count in summary["split"].items())]
    for name, teacher in summary["teachers"].items():
        lines.append(f"  {name}: {_teacher_line(teacher)}")
    if summary["fleiss_kappa"] is not None:
        lines.append(
            f"  Fleiss' kappa {summary['fleiss_kappa']:.2f}; {summary['disagreeing']} questions split the vote"
        )
    if summary["votes_asked"] or summary["votes_from_cache"]:
        lines.append(f"  {_saving(summary)}")
    if summary["votes_per_second"]:
        lines.append(
            f"  {summary['votes_per_second']:.1f} votes/s over {summary['seconds']:.0f} s, after "
            f"{summary['seconds_starting']:.0f} s of starting teachers; {summary['tokens']:,} tokens"
            + (f"; about {summary['cost']:.2f} in cost" if summary["cost"] else "")
        )
    lines += [f"  {count} questions got no vote: rejects/label.parquet" for count in [summary["rejected"]] if count]
    return "\n".join([*map(markup, lines), *(f"  [yellow]{markup(warning)}[/]" for warning in summary["warnings"])])


def _teacher_line(teacher: Mapping[str, Any]) -> str:
    parts = [" / ".join(str(count) for count in teacher["split"].values()), f"abstained {teacher['abstained']}"]
    if teacher["bias"]:
        leaning = max(teacher["bias"], key=teacher["bias"].get)
        parts.append(f"biased towards {leaning} by {teacher['bias'][leaning] - min(teacher['bias'].values()):.2f} nats")
    if teacher["latency"]:
        parts.append("latency " + " / ".join(f"{value:.2f}" for value in teacher["latency"].values()) + " s")
    return ", ".join(parts)


def _saving(summary: Mapping[str, Any]) -> str:
    """Requests that sequential voting and the cache saved."""
    asked, possible = summary["votes_asked"], summary["votes_possible"]
    not_asked = sum(teacher["not_asked"] for teacher in summary["teachers"].values())
    text = f"{asked} of {possible} votes asked for"
    saved = [f"{summary['votes_from_cache']} from the cache"] if summary["votes_from_cache"] else []
    saved += [f"{not_asked} not needed for a majority"] if not_asked else []
    return f"{text} ({100 * (1 - asked / possible):.0f} % saved: {', '.join(saved)})" if saved else text


def _counts(chosen: Counter[int], systems: Sequence[int]) -> dict[str, int]:
    return {str(system): chosen[system] for system in systems}
