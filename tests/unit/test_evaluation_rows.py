"""A model's answers to the test rows, some rows at a time."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.config import Config
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.engines.requests import Answer, Request
from lorapar_ray.evaluation import job
from lorapar_ray.evaluation.judging import judging_process
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import tiny_config


class Simulated:
    """An engine and a decoder: the answer to a prompt is its last token, as a number."""

    end_ids = (0,)

    def __init__(self) -> None:
        self.asked: list[int] = []

    def answers(self, requests: Sequence[Request], count: Callable[[int], None]) -> list[Answer]:
        self.asked.append(len(requests))
        count(len(requests))
        return [Answer(request.key, tokens=[request.ids[-1]]) for request in requests]

    def texts(self, answers: Sequence[Sequence[int]], _: object) -> list[str]:
        return [f"The answer is {tokens[0]}." for tokens in answers]


def test_rows_are_answered_and_judged_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "AT_ONCE", 3)
    config, run, model = Config.model_validate(tiny_config(tmp_path)), RunDirectory(tmp_path), Simulated()
    rows = [
        {"id": f"q{k}", "task": "even" if k % 2 == 0 else "odd", "answer": f"{k}", "prompt": "?"}
        | {"prompt_ids": [1, k if k != 4 else 99]}
        for k in range(7)
    ]
    arguments: list[Any] = [config, run, model, rows, "base", model]
    with judging_process("numeric") as process:
        job._answer_rows(*arguments, process)
    assert model.asked == [3, 3, 1]
    said = json.loads((run.eval / "base.json").read_text())
    assert (said["n"], said["correct"]) == (7, 6)
    assert {task: (found["n"], found["correct"]) for task, found in said["by_task"].items()} == {
        "even": (4, 3),
        "odd": (3, 3),
    }
    found = read_table(run.eval / "base.parquet")
    assert [row["id"] for row in found] == [f"q{k}" for k in range(7)]
    assert [row["completion"] for row in found if not row["right"]] == ["The answer is 99."]
