"""Reads a run directory for the report: any part may be missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import read_lines, read_object, read_tensors
from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import read_columns
from lorapar_ray.partition import load_regions, scatter_sample
from lorapar_ray.result_stages import RunState, state_of_run
from lorapar_ray.runs import RunDirectory

SCATTER_POINTS = 3000
MODELS = {
    "base": "base",
    **{f"sft-{system}": f"stage 1, after System {system}" for system in range(1, 10)},
    "sft": "stage 1 (SFT)",
    "grpo": "stage 2 (GRPO)",
}


@dataclass(frozen=True)
class RunData:
    """Parsed files of a run; None or empty where a stage has not run.

    Those of a stage that is out of date (see `state`) are there too: do not show them as results of what is in the run
    now.
    """

    state: RunState
    stages: dict[str, dict[str, Any]]
    labels: dict[str, Any] | None
    partition: dict[str, Any] | None
    systems: dict[str, Any] | None
    """The regions, if each System has one of its own (see `partition.systems`)."""
    scatter: dict[str, list[Any]] | None
    sft: list[dict[str, Any]]
    grpo: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    accuracy: dict[str, dict[str, Any]]
    """By model name, in the order of `MODELS`."""
    right: dict[str, dict[str, bool]]
    """By model name, whether each question, by its id, was answered correctly."""
    shares: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By model name, its shares on lm-eval's tasks."""


def read_run(config: Config, run: RunDirectory) -> RunData:
    """Read what the run holds so far, and which of it is out of date under `config`."""
    accuracy = {name: _json(run.eval / f"{name}.json") for name in MODELS}
    return RunData(
        state=state_of_run(config, run),
        stages=run.manifest().get("stages", {}),
        labels=_json(run.label_summary) or _json(run.labels / "summary.json"),  # where it was before
        partition=_json(run.partition / "summary.json"),
        systems=_json(run.partition / "systems.json"),
        scatter=_scatter(run),
        sft=read_lines(run.metrics / "sft.jsonl"),
        grpo=read_lines(run.metrics / "grpo.jsonl"),
        samples=read_lines(run.metrics / "samples.jsonl"),
        accuracy={name: found for name, found in accuracy.items() if found is not None},
        right={name: _right(path) for name in MODELS if (path := run.eval / f"{name}.parquet").is_file()},
        shares={name: found for name in MODELS if (found := of_tasks(run.eval, name)[0])},
    )


def of_tasks(root: Path, model: str) -> tuple[list[dict[str, Any]], list[tuple[str, Path]]]:
    """A model's shares on lm-eval's tasks, and each task with the table of its answers, in an evaluation's folder."""
    results = sorted((root / "tasks" / model).glob("*.json"))
    labels = [(file, read_object(file)) for file in results]
    shares = [share | {"asked": label["task"]} for _, label in labels for share in label["results"]]
    return shares, [(label["task"], root / "rows" / model / f"{file.stem}.parquet") for file, label in labels]


def _scatter(run: RunDirectory) -> dict[str, list[Any]] | None:
    files = [run.scores / "system1.safetensors", run.scores / "system2.safetensors"]
    regions = run.partition / "regions.safetensors"
    if not all(path.is_file() for path in [*files, regions]):
        return None
    scores1, scores2 = (read_tensors(path) for path in files)
    return scatter_sample(scores1, scores2, load_regions(regions)[0], n=SCATTER_POINTS, seed=0)


def _right(path: Path) -> dict[str, bool]:
    return {row["id"]: row["right"] for row in read_columns(path, {"id": str, "right": bool})}


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return read_object(path)
