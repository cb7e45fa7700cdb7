"""An evaluation's figures, and the page that compares models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from lorapar_ray.evaluation.harness.results import summary
from lorapar_ray.evaluation.task_files import result_file, rows_file
from lorapar_ray.files import write_json
from lorapar_ray.reporting.evaluation_page import (
    Found,
    comparisons,
    failures,
    read_found,
    read_run_found,
    write_page,
    wrong_answers,
)
from lorapar_ray.runs import RunDirectory


def test_a_group_weights_its_questions_equally() -> None:
    rows = [
        {"task": task, "metric": "acc", "filter": "none", "value": value}
        for task, values in (("a", (1.0, 0.0, 0.0)), ("b", (1.0,)), ("c", (0.0,)))
        for value in values
    ]
    found = {share["task"]: share for share in summary(rows, {"all": ["a", "b", "c"], "some": ["a", "b"]})}
    assert list(found) == ["all", "some", "a", "b", "c"]
    assert (found["all"]["correct"], found["all"]["n"], found["some"]["accuracy"]) == (2, 5, 0.5)
    mean = summary([{**rows[0], "value": value} for value in (0.25, 0.75)], {})[0]
    assert mean["accuracy"] == 0.5 and "correct" not in mean


def test_the_page_compares_and_shows_failures(tmp_path: Path) -> None:
    from lorapar_ray.evaluation.harness.results import write_rows

    base = {"task": "t", "metric": "acc", "filter": "none", "prompt": "<b>2 + 2?</b>", "target": "4", "extracted": "5"}
    for model, rights in (("one", (0, 0, 0, 1)), ("two", (1, 1, 1, 1))):
        rows = [
            {**base, "id": str(at), "value": float(right), "right": bool(right), "completion": "five"}
            for at, right in enumerate(rights)
        ]
        write_rows(rows_file(tmp_path, model, "t@0"), rows)
        result_file(tmp_path, model, "t@0").parent.mkdir(parents=True)
        result_file(tmp_path, model, "t@0").write_text(
            json.dumps({"model": model, "task": "t@0", "results": summary(rows, {})})
        )
    page = write_page(tmp_path, ["one", "two"]).read_text()
    assert "+75.0" in page and ">0.25<" in page and page.count('data-task="t@0"') == 3
    assert "&lt;b&gt;2 + 2?" in page and "<b>2 + 2?" not in page
    assert pyarrow.dataset.dataset(tmp_path / "rows").count_rows() == 8
    assert list(read_found(tmp_path, ["nobody"])[0].rows) == []


def test_the_failures_of_a_run_s_test_rows_are_some_of_many_with_their_prompts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.data.mkdir()
    run.eval.mkdir()
    questions = [{"id": f"{k}", "prompt": f"question {k}", "system": None} for k in range(1500)]
    pq.write_table(pa.Table.from_pylist(questions), run.data / "test.parquet")
    share = {"n": 1500, "correct": 1000, "accuracy": 2 / 3, "interval": [0.6, 0.7]}
    for model, right in (("base", lambda k: k % 3 > 0), ("sft", lambda k: k >= 10)):
        rows = [
            {"id": f"{k}", "task": "t", "answer": f"{k}", "completion": "?", "right": right(k)} for k in range(1500)
        ]
        pq.write_table(pa.Table.from_pylist(rows), run.eval / f"{model}.parquet")
        write_json(run.eval / f"{model}.json", {**share, "by_task": {"t": share}})
    base, sft = read_run_found(run)
    assert (wrong_answers(base), wrong_answers(sft)) == ({"test rows": 500}, {"test rows": 10})
    shown = failures(base, wrong_answers(base))  # every third of 500
    assert [row["id"] for row in shown] == [f"{k}" for k in range(0, 1500, 9)]
    assert all(row["prompt"] == f"question {row['target']}" and row["model"] == "base" for row in shown)
    assert [row["id"] for row in failures(sft, wrong_answers(sft))] == [f"{k}" for k in range(10)]
    (paired,) = comparisons([base, sft])
    assert (paired["n"], paired["gained"], paired["lost"]) == (1500, 496, 6)


def test_shares_of_several_samples_are_not_compared_as_right_or_wrong() -> None:
    """A question answered in 3 of 10 samples has no verdict; without it the others would be a biased choice."""

    def rows(metric: str, values: Sequence[float]) -> list[dict[str, Any]]:
        kind = {"asked": "t@0", "task": "t", "metric": metric, "filter": "none"}
        return [
            {**kind, "id": str(at), "value": value, "right": bool(value) if value in (0, 1) else None}
            for at, value in enumerate(values)
        ]

    one = Found("one", [], rows("pass@1", [0.3, 0, 0, 0]) + rows("acc", [0, 0, 0, 0]))
    two = Found("two", [], rows("pass@1", [0, 1, 1, 1]) + rows("acc", [0, 1, 1, 1]))
    for first, second in ((one, two), (two, one)):
        assert [(row["metric"], row["n"]) for row in comparisons([first, second])] == [("acc", 4)]
