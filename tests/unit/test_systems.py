"""K Systems: labels from the config, regions, training one after the other, and what is forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import run_stage
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import tiny_config

TASKS = ("chain_sum", "letter_counting", "gcd")
DEFINITIONS = dict(enumerate(TASKS, start=1))


def sources(seed: int, rows: int) -> list[dict[str, Any]]:
    return [
        {"reader": "reasoning_gym", "task": task, "rows": rows, "seed": seed, "system": system}
        for system, task in DEFINITIONS.items()
    ]


def three_systems(**changes: Any) -> dict[str, Any]:
    """Three generated tasks, each a System; stage 1 alone."""
    return {
        **tiny_config(Path("student")),
        "order": ["sft"],
        "data": {"train": sources(1, 8), "test": sources(2, 4)},
        "label": {"strategy": "source", "definitions": DEFINITIONS},
        **changes,
    }


def test_the_label_is_the_system_of_the_source(tmp_path: Path) -> None:
    config, run = Config.model_validate(three_systems()), RunDirectory(tmp_path / "run")
    run.open(config)
    run_stage(config, run, "label")
    labelled = read_table(run.labels, {"task": str, "system": int})
    assert {row["task"]: row["system"] for row in labelled} == {task: k for k, task in DEFINITIONS.items()}
    assert {row["task"]: row["system"] for row in read_table(run.data / "test.parquet")} == {
        row["task"]: row["system"] for row in labelled
    }
    assert json.loads(run.label_summary.read_text())["split"].keys() == {"1", "2", "3"}


def test_files_of_rows_without_a_system_have_no_such_column(tmp_path: Path) -> None:
    plain = {**tiny_config(Path("student")), "label": {"strategy": "random"}}
    config, run = Config.model_validate(plain), RunDirectory(tmp_path / "run")
    run.open(config)
    run_stage(config, run, "label")
    assert "system" not in pq.read_schema(run.data / "train.parquet").names
    assert "system" not in pq.read_schema(run.data / "test.parquet").names


def test_a_system_whose_rows_are_all_test_rows_is_an_error(tmp_path: Path) -> None:
    train = sources(1, 4)
    config = Config.model_validate(three_systems(data={"train": train, "test": train[2:]}))
    run = RunDirectory(tmp_path / "run")
    run.open(config)
    with pytest.raises(UserError, match=r"no row of System 3 is left.*rejects/prepare\.parquet"):
        run_stage(config, run, "label")
    assert not list(run.labels.glob("*.parquet"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"train": sources(1, 8)[:2]}}, "data.train: no entry has system 3"),
        ({"label": {"strategy": "source", "definitions": {1: "a", 3: "b"}}}, "must be numbered 1 to K"),
        ({"label": {"strategy": "source"}}, r"data.train\[2\].system: System 3 is not in label.definitions \(1 to 2\)"),
        ({"data": {"train": [*sources(1, 8), tiny_config(Path("s"))["data"]["train"][0]]}}, r"data.train\[3\].system"),
        ({"label": {"strategy": "random", "definitions": DEFINITIONS}}, "label.strategy random does not use"),
        (
            {"label": {"strategy": "source", "definitions": DEFINITIONS, "shuffled": True}},
            "strategy source has no votes",
        ),
    ],
)
def test_systems_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(three_systems(**changes))
