"""lm-eval's results, as rows by question and as shares with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.evaluation.statistics import Z_95, wilson_interval
from lorapar_ray.files import atomic_path

ROW_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("id", pa.string()),
        ("metric", pa.string()),
        ("filter", pa.string()),
        ("value", pa.float64()),
        ("right", pa.bool_()),
        ("prompt", pa.string()),
        ("target", pa.string()),
        ("completion", pa.string()),
        ("extracted", pa.string()),
    ]
)
"""One row for each question, metric and filter. `right`: null if the value is neither 0 nor 1."""


def rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows (`ROW_SCHEMA`) of the result of `lm_eval.evaluator.evaluate`, tasks and questions in its order."""
    return [row for task, samples in found["samples"].items() for sample in samples for row in _rows(task, sample)]


def _rows(task: str, sample: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    several = len(sample["arguments"]) > 1  # a choice among continuations of one prompt
    if several:
        choices = [arguments[1] for arguments in sample["arguments"]]
        scores = [response[0] for response in sample["filtered_resps"]]
        best = max(range(len(scores)), key=scores.__getitem__)
        completion = "\n".join(f"{float(score):9.3f} {choice}" for score, choice in zip(scores, choices, strict=True))
        extracted = choices[best]
    else:
        completion = "\n".join(map(str, sample["resps"][0]))
        found = sample["filtered_resps"][0]
        extracted = found if isinstance(found, str) else ""  # else verdicts of our own filters
    for metric in sample["metrics"]:
        value = sample[metric]
        if isinstance(value, bool | int | float):
            yield {
                "task": task,
                "id": str(sample["doc_id"]),
                "metric": metric,
                "filter": sample["filter"],
                "value": float(value),
                "right": bool(value) if value in (0, 1) else None,
                "prompt": str(sample["arguments"][0][0]),
                "target": str(sample["target"]),
                "completion": completion,
                "extracted": extracted,
            }


def write_rows(target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as one Parquet file."""
    with atomic_path(target) as draft:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=ROW_SCHEMA), draft)


def summary(rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """{task, metric, filter, n, correct, accuracy, interval} of each task and group, JSON-ready.

    All questions of a group have equal weight, as in MMLU's categories. The interval is Wilson's if every value is 0 or
    1, else normal, about the mean.

    Args:
        groups: tasks of each group, including nested groups.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        for name in (row["task"], *(group for group, tasks in groups.items() if row["task"] in tasks)):
            values.setdefault((name, row["metric"], row["filter"]), []).append(row["value"])
    order = {name: place for place, name in enumerate([*groups, *dict.fromkeys(row["task"] for row in rows)])}
    return [
        {"task": name, "metric": metric, "filter": kind} | _share(found)
        for (name, metric, kind), found in sorted(values.items(), key=lambda item: order[item[0][0]])
    ]


def _share(values: Sequence[float]) -> dict[str, Any]:
    n, total = len(values), sum(values)
    mean = total / n
    if all(value in (0.0, 1.0) for value in values):
        return {"n": n, "correct": int(total), "accuracy": mean, "interval": list(wilson_interval(int(total), n))}
    spread = Z_95 * sqrt(sum((value - mean) ** 2 for value in values) / max(1, n - 1) / n)
    return {"n": n, "accuracy": mean, "interval": [mean - spread, mean + spread]}


def leaves(groups: Mapping[str, Any]) -> dict[str, list[str]]:
    """The tasks of each of lm-eval's groups, including nested groups."""
    return {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}
