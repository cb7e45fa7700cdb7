"""A vote in numbers: the split, who agrees with whom, how sure, how fast."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lorapar_ray.config import LabelConfig
from lorapar_ray.labeling.votes import Vote, fleiss_kappa, pairwise_agreement

DISAGREEMENTS_SHOWN = 8
PERCENTILES = (50, 95, 99)


def summarise(
    label: LabelConfig,
    rows: Sequence[dict[str, Any]],
    rejected: int,
    bias: dict[str, list[float]],
    seconds: float,
) -> dict[str, Any]:
    """JSON-ready summary of labelled rows.

    Args:
        rows: as in `labels/*.parquet`.
        rejected: how many questions got no vote.
        bias: each teacher's log-probabilities of the Systems that calibration divided out.
        seconds: wall-clock time of the asking (0 if nothing was asked).
    """
    systems = sorted(label.definitions)
    votes = [[Vote(**vote) for vote in row["votes"]] for row in rows]
    by_teacher: dict[str, list[Vote]] = defaultdict(list)
    for found in votes:
        for vote in found:
            by_teacher[vote.teacher].append(vote)
    cast = sum(map(len, votes))
    confidences = [vote.confidence for found in votes for vote in found]
    counts, edges = np.histogram(confidences, bins=10, range=(1 / len(systems), 1.0))
    split = _count((row["system"] for row in rows), systems)
    return {
        "strategy": label.strategy,
        "calibration": label.calibration,
        "rows": len(rows),
        "rejected": rejected,
        "split": split,
        "teachers": {
            teacher.name: _teacher(teacher.model, by_teacher[teacher.name], len(rows), systems, bias.get(teacher.name))
            for teacher in label.teachers
        },
        "pairwise_agreement": pairwise_agreement(votes),
        "fleiss_kappa": fleiss_kappa([[vote.system for vote in found] for found in votes]) if cast else None,
        "confidence_histogram": {"edges": [round(float(edge), 4) for edge in edges], "counts": counts.tolist()},
        "by_task": _cross(rows, lambda row: row["task"], systems),
        "by_difficulty": _cross(rows, lambda row: f"{row['task']}: {row['difficulty']}", systems),
        "disagreements": [
            {"prompt": row["prompt"], "answer": row["answer"], "system": row["system"], "votes": row["votes"]}
            for row in rows
            if len({vote["system"] for vote in row["votes"]}) > 1
        ][:DISAGREEMENTS_SHOWN],
        "votes": cast,
        "seconds": round(seconds, 2),
        "votes_per_second": round(cast / seconds, 3) if seconds else None,
        "warnings": [f"no question is labelled System {system}" for system in systems if split[str(system)] == 0],
    }


def render(summary: dict[str, Any]) -> str:
    """The summary in a few lines for the console."""
    lines = ["  " + ", ".join(f"System {system}: {count}" for system, count in summary["split"].items())]
    for name, teacher in summary["teachers"].items():
        split = " / ".join(str(count) for count in teacher["split"].values())
        lines.append(f"  {name}: {split}, abstained {teacher['abstained']}")
    if summary["fleiss_kappa"] is not None:
        lines.append(f"  Fleiss' kappa {summary['fleiss_kappa']:.2f}, {summary['votes_per_second']} votes/s")
    return "\n".join(lines + [f"  [yellow]{warning}[/]" for warning in summary["warnings"]])


def _teacher(model: str, votes: list[Vote], rows: int, systems: list[int], bias: list[float] | None) -> dict[str, Any]:
    latencies = [vote.latency_s for vote in votes]
    return {
        "model": model,
        "split": _count((vote.system for vote in votes), systems),
        "abstained": rows - len(votes),
        "bias": None if bias is None else round(bias[-1] - bias[0], 4),
        "mean_confidence": round(float(np.mean([vote.confidence for vote in votes])), 4) if votes else None,
        "latency": {f"p{p}": round(float(np.percentile(latencies, p)), 4) for p in PERCENTILES} if votes else {},
    }


def _count(chosen: Any, systems: list[int]) -> dict[str, int]:
    counter = Counter(chosen)
    return {str(system): counter[system] for system in systems}


def _cross(
    rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], str], systems: list[int]
) -> dict[str, dict[str, int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row["system"])
    return {name: _count(chosen, systems) for name, chosen in sorted(groups.items())}
