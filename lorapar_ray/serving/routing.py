"""Decides a question's System by the student's own vote, without an answer.

The student votes like a teacher (paper, section 3.1): by the log-odds of System 2 at one token. A small model is biased
towards one System, so the threshold on its log-odds is fitted to questions that the run's teachers labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lorapar_ray.config import Config, TeacherConfig
from lorapar_ray.labeling.prompts import prompt_opening, question_block

QUESTIONS = 64
"""Most questions of each System to fit the threshold."""


@dataclass(frozen=True)
class Threshold:
    """From these log-odds on, a question is System 2."""

    log_odds: float
    """Nats."""
    agreement: float
    """Mean over the Systems of the share of correct labels, on the fitted questions; 0.5 is chance."""


def fit_threshold(system1: Sequence[float], system2: Sequence[float]) -> Threshold:
    """The threshold with the best agreement; if several, the middle one.

    Args:
        system1: log-odds of System 2, in nats, of questions labelled System 1; at least one.
        system2: the same of questions labelled System 2; at least one.
    """
    values = sorted({*system1, *system2})
    between = [(low + high) / 2 for low, high in pairwise(values)]
    places = [values[0] - 1.0, *between, values[-1] + 1.0]

    def agreement(place: float) -> float:
        first = sum(value < place for value in system1) / len(system1)
        second = sum(value >= place for value in system2) / len(system2)
        return (first + second) / 2

    best = max(map(agreement, places))
    good = [place for place in places if agreement(place) == best]
    return Threshold(good[len(good) // 2], best)


def routing_prompt(config: Config, student: str, question: str) -> str:
    """The student's prompt: the run's voting prompt, with an empty answer."""
    voter = TeacherConfig(name="student", model=config.model.path)
    opening = prompt_opening(config.label, voter, student)
    return opening + question_block(config.label, question, "").replace(" \n", "\n")


def stages_by_system(config: Config) -> dict[int, str]:
    """The stage that trains on each System's questions; empty if `auto` has no choice."""
    trained = {"sft": config.sft.systems, "grpo": config.grpo.systems}
    found: dict[int, str] = {}
    for stage in config.order:
        for system in trained[stage]:
            found.setdefault(system, stage)
    return found if set(found) == {1, 2} and len(set(found.values())) == 2 else {}
