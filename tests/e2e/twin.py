"""What a run that was disturbed has in common with its undisturbed twin."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from lorapar_ray.datasets.rows import read_table
from tests.tiny_run import metrics

FILES = {
    "score": ("scores/system1", "scores/system2"),
    "partition": ("partition/regions",),
    "sft": ("sft/adapter/adapter_model",),
}


def ends_as_its_twin(stage: str, run: Path, twin: Path) -> None:
    """Whether a stage's results are those of an undisturbed run; of stage 2, which samples, that no step is missing,
    none is done twice and each had the twin's prompts."""
    for name in FILES.get(stage, ()):
        ours, theirs = (load_file(root / f"{name}.safetensors") for root in (run, twin))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), f"{name}: {key}"
    if stage == "label":
        ours, theirs = (read_table(root / "labels") for root in (run, twin))
        assert voted(ours) == voted(theirs)
    if stage == "evaluate":  # greedy, of the models that are the twin's
        for name in ("base", "sft"):
            ours, theirs = (pq.read_table(root / "eval" / f"{name}.parquet").to_pylist() for root in (run, twin))
            assert ours == theirs
    if stage in ("sft", "grpo"):
        ours, theirs = metrics(run, stage), metrics(twin, stage)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        if stage == "grpo":
            assert [line["policy_version"] for line in ours] == [line["policy_version"] for line in theirs]
            assert [line["prompts"] for line in ours] == [line["prompts"] for line in theirs]


def voted(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, list[tuple[str, int]]]]:
    """By question, its label and who voted for what."""
    return {row["id"]: (row["system"], [(vote["teacher"], vote["system"]) for vote in row["votes"]]) for row in rows}


def is_done(run: Path, stage: str) -> bool:
    """Whether a run's manifest says so; it may not be there yet."""
    file = run / "manifest.json"
    return file.is_file() and json.loads(file.read_text())["stages"].get(stage, {}).get("status") == "done"
