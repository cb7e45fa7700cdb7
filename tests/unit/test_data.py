"""Config, run directory, readers, prompts in order, state files."""

import errno
import json
import os
import sqlite3
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from lorapar_ray.config_file import load_config
from lorapar_ray.datasets.named import NAMED
from lorapar_ray.datasets.prepare import prepare
from lorapar_ray.datasets.records import read_records
from lorapar_ray.datasets.rows import read_columns, read_table
from lorapar_ray.datasets.seen import seen_texts
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.accuracy import accuracy
from lorapar_ray.evaluation.statistics import wilson_interval
from lorapar_ray.files import atomic_path, finished_files, write_json
from lorapar_ray.grpo.prompt_stream import PromptStream
from lorapar_ray.runs import RunDirectory
from lorapar_ray.tensortree import load_tree, save_tree

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
SHARED = Path(__file__).parents[3] / "shared" / "data"


def write_config(folder: Path, rows: list[dict[str, str]], test: list[dict[str, str]]) -> Path:
    for name, part in (("train", rows), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    sources = {name: [{"reader": "file", "path": str(folder / f"{name}.jsonl")}] for name in ("train", "test")}
    path = folder / "config.yaml"
    path.write_text(json.dumps({"name": "t", "model": {"path": "a/b"}, "data": sources}))
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_survive_their_own_yaml(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config


def test_overrides_reach_nested_fields_and_lists() -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["partition.theta=0.5", "data.train.0.rows=3", "seed=9"])
    assert (config.partition.theta, config.data.train[0].rows, config.seed) == (0.5, 3, 9)


def test_train_and_test_are_disjoint_and_the_rest_is_in_rejects(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 4}", "answer": str(i)} for i in range(6)]
    config = load_config(write_config(tmp_path, rows, [{"prompt": "q1", "answer": "1"}]))
    run = RunDirectory(tmp_path / "run")
    assert prepare(config, run) == {"train": 3, "test": 1, "rejected": 3}
    kept = {row["prompt"] for row in read_table(run.data / "train.parquet")}
    assert kept == {"q0", "q2", "q3"}
    rejected = read_table(run.rejects / "prepare.parquet")
    assert len(rejected) == 3 and all(row["reason"] and row["prompt"] in kept | {"q1"} for row in rejected)
    assert {row["stage"] for row in rejected} == {"prepare"} and json.loads(rejected[0]["columns"])["answer"]


def test_named_readers_on_records_of_their_published_form() -> None:
    records = {
        "gsm8k": ({"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}, ("q", "1+1=2\n#### 2", "2")),
        "boolq": ({"passage": "p", "question": "is it", "answer": True}, ("p\n\nQuestion: is it?", "yes", "yes")),
        "mawps": ({"instruction": "q", "answer": "4.0"}, ("q", "4", "4")),
        "svamp": ({"Body": "b.", "Question": "q?", "Answer": 51.0}, ("b. q?", "51", "51")),
        "mmlu": (
            {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 2},
            ("q\nA. w\nB. x\nC. y\nD. z\nAnswer with the letter only.", "C", "C"),
        ),
        "dolly": ({"instruction": "i", "context": "c", "response": "r"}, ("c\n\ni", "r", "r")),
        "openplatypus": ({"instruction": "i", "input": "", "output": "o"}, ("i", "o", "o")),
        "codealpaca": ({"instruction": "i", "input": "x", "output": "o"}, ("i\n\nx", "o", "o")),
        "codefeedback": ({"query": "q", "answer": "a"}, ("q", "a", "a")),
    }
    assert records.keys() == NAMED.keys()
    for name, (record, expected) in records.items():
        assert NAMED[name].convert(record) == expected
    assert NAMED["mawps"].convert({"original_text": "q", "ans": 2.5}) == ("q", "2.5", "2.5")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the benchmark data folder beside the checkout")
@pytest.mark.parametrize(
    ("source", "file", "count", "first"),
    [
        ("gsm8k", "gsm8k/train.jsonl", 7473, ("Natalia sold clips", "72")),
        ("dolly", "dolly15k/databricks-dolly-15k.jsonl.gz", 15011, ("", "")),
        ("boolq", "llm_adapters/boolq/train.json", 9427, ("Please answer the following question with true", "true")),
        ("mawps", "llm_adapters/mawps/trainset.json", 1898, ("A waiter had 22 customers", "2")),
        ("mawps", "llm_adapters/mawps/test.json", 238, ("Nicole found an orange", "1.8333333333333335")),
        ("mmlu", "mmlu/mmlu_val.jsonl.gz", 1531, ("The cyclic subgroup of Z_24", "A")),
        ("codealpaca", "codealpaca/code_alpaca_20k.jsonl.gz", 20022, ("Read the code below", "def sum_two")),
        (
            {"prompt": "Question", "context": "Body", "answer": "Answer", "id": "ID"},
            "svamp/SVAMP.json",
            1000,
            (
                "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack\n\nHow much",
                "51.0",
            ),
        ),
        (
            {"prompt": "question", "response": "rationale", "answer": "correct"},
            "aqua/test.json",
            254,
            ("A car is being driven", "A"),
        ),
        (
            {"prompt": "instruction", "response": "output"},
            "llm_adapters/openbookqa/test.json",
            500,
            ("Please choose", "answer2"),
        ),
        (
            {"prompt": "text", "answer": "code", "id": "task_id"},
            "mbpp/mbpp.jsonl",
            974,
            ("Write a function to find the minimum cost path", "R = 3"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else "",
)
def test_real_benchmark_files_are_read_whole(
    source: str | dict[str, str], file: str, count: int, first: tuple[str, str], tmp_path: Path
) -> None:
    reader = {"reader": source} if isinstance(source, str) else {"reader": "file", "fields": source}
    source = {**reader, "path": str(SHARED / file)}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"name": "t", "model": {"path": "a/b"}, "data": {"train": [source]}}))
    counts = prepare(load_config(path), RunDirectory(tmp_path / "run"))
    assert counts["train"] + counts["rejected"] == count
    row = read_table(tmp_path / "run" / "data" / "train.parquet")[0]
    assert row["prompt"].startswith(first[0]) and row["answer"].startswith(first[1])
    assert row["response"] and row["id"]


def test_missing_answers_of_benchmarks_are_rejected_and_of_users_are_an_error(tmp_path: Path) -> None:
    rows = [{"instruction": "i", "output": "o"}, {"instruction": "gap", "output": " "}]
    path = tmp_path / "c.yaml"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"reader": "codealpaca", "path": str(tmp_path / "rows.jsonl")}
    path.write_text(json.dumps({"name": "t", "model": {"path": "a/b"}, "data": {"train": [source]}}))
    run = RunDirectory(tmp_path / "run")
    assert prepare(load_config(path), run) == {"train": 1, "test": 0, "rejected": 1}
    assert read_table(run.rejects / "prepare.parquet")[0]["reason"] == "no answer in the published data"


NO_QUESTION = {
    "gsm8k": {"question": None, "answer": "1+1\n#### 2"},
    "boolq": {"passage": "p", "question": None, "answer": True},
    "mawps": {"Question": None, "Numbers": "1 2", "Answer": 3},
    "svamp": {"Body": "b.", "Question": None, "Answer": 51.0},
    "mmlu": {"question": None, "choices": ["w", "x"], "answer": 1},
    "dolly": {"instruction": None, "context": "c", "response": "r"},
    "openplatypus": {"instruction": None, "input": "x", "output": "o"},
    "codealpaca": {"instruction": " ", "input": "", "output": "o"},
    "codefeedback": {"query": None, "answer": "a"},
}


@pytest.mark.parametrize("reader", NAMED)
def test_a_record_without_its_question_is_rejected_and_one_that_is_no_text_is_named(
    reader: str, tmp_path: Path
) -> None:
    record = NO_QUESTION[reader]
    blank = next(name for name in record if record[name] in (None, " "))
    path, rows = tmp_path / "c.yaml", tmp_path / "rows.jsonl"
    source = {"reader": reader, "path": str(rows)}
    path.write_text(json.dumps({"name": "t", "model": {"path": "a/b"}, "data": {"train": [source]}}))
    rows.write_text(f"{json.dumps(record)}\n{json.dumps({**record, blank: 'Is it?'})}\n")
    run = RunDirectory(tmp_path / "run")
    assert prepare(load_config(path), run) == {"train": 1, "test": 0, "rejected": 1}
    [row], [rejected] = read_table(run.data / "train.parquet"), read_table(run.rejects / "prepare.parquet")
    assert "Is it" in row["prompt"] and rejected["reason"] == "no question in the published data"
    rows.write_text(json.dumps({**record, blank: ["Is", "it?"]}))
    with pytest.raises(UserError, match=rf"'.*rows\.jsonl' row 0.*'?(?:{blank}|prompt)"):
        prepare(load_config(path), RunDirectory(tmp_path / "other"))


def test_generated_questions_whose_difficulty_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    source = {"reader": "reasoning_gym", "task": "gsm_symbolic", "rows": 3, "seed": 1}
    path.write_text(json.dumps({"name": "t", "model": {"path": "a/b"}, "data": {"train": [source]}}))
    assert prepare(load_config(path), RunDirectory(tmp_path / "run"))["train"] == 3


def test_columns_are_read_without_the_others(tmp_path: Path) -> None:
    rows = [{"id": f"{k}", "right": k % 3 == 0, "completion": "long " * 100} for k in range(10)]
    for part in (0, 1):
        pq.write_table(pa.Table.from_pylist(rows[5 * part :][:5]), tmp_path / f"{part}.parquet")
    found = list(read_columns(tmp_path, {"id": str, "right": bool}))
    assert found == [{"id": row["id"], "right": row["right"]} for row in rows]
    for columns in ({"id": str, "system": int}, {"system": int}, {"right": str}):
        with pytest.raises(UserError, match=r"0.parquet' is damaged or has another format"):
            list(read_columns(tmp_path, columns))


def test_any_hub_data_set_is_streamed_with_a_field_mapping(tmp_path: Path) -> None:
    folder = tmp_path / "set"  # the hub client reads a directory like its servers
    folder.mkdir()
    pq.write_table(pa.table({"q": ["one?", "two?", "three?"], "a": ["1", "2", "3"]}), folder / "train.parquet")
    path = tmp_path / "c.yaml"
    source = {"reader": "hub", "name": str(folder), "fields": {"prompt": "q", "answer": "a"}, "rows": 2}
    path.write_text(json.dumps({"name": "t", "model": {"path": "a/b"}, "data": {"train": [source]}}))
    run = RunDirectory(tmp_path / "run")
    assert prepare(load_config(path), run)["train"] == 2
    assert [row["answer"] for row in read_table(run.data / "train.parquet")] == ["1", "2"]
    with pytest.raises(UserError, match=r"data\.train\[0\]: cannot read .*nowhere.* from the hub"):
        prepare(load_config(path, [f"data.train.0.name={tmp_path}/nowhere/x"]), RunDirectory(tmp_path / "other"))


def test_json_lists_and_jsonl_are_streamed_whatever_their_name(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i} [{{, ]", "answer": "x" * (i % 300), "n": [i, {"k": None}]} for i in range(2000)]
    listed, lines = tmp_path / "list.json", tmp_path / "lines.json"
    listed.write_text("\n " + json.dumps(rows, indent=1))
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    assert list(read_records(str(listed), "w")) == rows == list(read_records(str(lines), "w"))
    (tmp_path / "empty.json").write_text("[ ]")
    assert list(read_records(str(tmp_path / "empty.json"), "w")) == []


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ('[{"a": 1},\n {"a": }]', "line 2 is not JSON"),
        ('[{"a": 1},\n{"a": 2}\n', "line 3 is not JSON .the list does not end"),
        ('[{"a": 1}]\n[{"a": 2}]\n', r"line 2 is not JSON .there is text after the list's closing '\]'"),
        ('[{"a": 1}] garbage', "line 1 is not JSON .there is text after"),
        ('[]\n{"a": 2}\n', "line 2 is not JSON .there is text after"),
        ('[{"a": 1}\n]' + "\n " * 100_000 + "]", "line 100002 is not JSON .there is text after"),
        ('{"a": 1}\n{"b"\n', "line 2 is not JSON"),
        ('{"a": 1}\n[2]\n', "row 2 is not a JSON object"),
        ('{"a": 1}\n{"a": 1, "a": 2}\n', "line 2 is not JSON .'a' is given twice in one object"),
        ('[{"a": {}},\n {"a": {"b": 1, "b": 2}}]', "line 2 is not JSON .'b' is given twice in one object"),
        ('[{"":0,"":0}', "line 1 is not JSON .'' is given twice in one object"),
        ('[{"a": 1},\n {"a": x}' + ', {"a": 1}' * 100_000 + "]", "line 2 is not JSON"),
    ],
)
def test_a_broken_file_is_one_line_with_the_place(text: str, culprit: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=rf"data\.train\[0\].*rows\.json.*{culprit}"):
        list(read_records(str(tmp_path / "rows.json"), "data.train[0]"))


def test_an_element_over_many_chunks_is_read_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapar_ray.datasets.records.CHUNK", 3)
    records = [{"a": "x" * length, "b": [True, -1.5e-3, "\u00e9\\"], "c": -12345678901234} for length in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(records, indent=1))
    assert list(read_records(str(tmp_path / "rows.json"), "data.train[0]")) == records


@pytest.mark.slow
def test_reading_and_preparing_hold_a_few_rows_and_not_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapar_ray.datasets.rows.ROWS_PER_WRITE", 256)

    def peak(count: int) -> int:
        source = tmp_path / f"{count}.json"
        with source.open("w") as file:
            file.write("[")
            file.writelines(
                json.dumps({"prompt": f"{i} {'q' * 200}", "answer": "1"}) + ("," if i < count - 1 else "]")
                for i in range(count)
            )
        config = load_config(write_config(tmp_path, [{"prompt": "q", "answer": "1"}], [{"prompt": "t", "answer": "1"}]))
        train = [config.data.train[0].model_copy(update={"path": str(source)})]
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": train})})
        tracemalloc.start()
        assert prepare(config, RunDirectory(tmp_path / f"run-{count}"))["train"] == count
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    few = peak(2_000)
    assert peak(8_000) < 1.2 * few


TEMPORARY_FULL = r"no space left on the disk of '/.*'; free some, or set TMPDIR to a folder on"


def test_a_full_temporary_folder_is_one_line() -> None:
    with seen_texts(1) as [seen]:
        seen._database.execute("PRAGMA max_page_count=4")
        with pytest.raises(UserError, match=TEMPORARY_FULL):
            for number in range(100_000):
                seen.add(str(number))


def test_a_temporary_folder_that_is_full_from_the_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def without_room(*arguments: Any, **options: Any) -> sqlite3.Connection:
        database = connect(*arguments, **options)
        database.execute("PRAGMA max_page_count=1")
        return database

    with monkeypatch.context() as patch, pytest.raises(UserError, match=TEMPORARY_FULL):
        patch.setattr(sqlite3, "connect", without_room)
        with seen_texts(1):
            pass

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=TEMPORARY_FULL):
        patch.setattr(os, "mkdir", full)
        with seen_texts(1):
            pass


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "scores.json"
    write_json(target, {"kept": 1})
    with pytest.raises(UserError, match=r"no space left on the disk of .*scores\.json"), atomic_path(target) as draft:
        draft.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match="no space left on the disk of"), atomic_path(target):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert json.loads(target.read_text()) == {"kept": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_files_are_found_while_a_process_removes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_json(tmp_path / name / "file.json", {})
    (tmp_path / "a" / "gone").mkdir()
    look = os.scandir

    def remove_first(path: str | int) -> Any:
        if path == str(tmp_path / "a" / "gone"):
            Path(path).rmdir()
        return look(path)

    monkeypatch.setattr(os, "scandir", remove_first)
    with atomic_path(tmp_path / "b" / "draft") as draft:
        draft.write_text("half")
        assert finished_files(tmp_path) == [tmp_path / "a" / "file.json", tmp_path / "b" / "file.json"]
    assert not (tmp_path / "a" / "gone").exists()


@given(takes=st.lists(st.integers(1, 5), min_size=1, max_size=12), untrained=st.integers(0, 3), count=st.integers(1, 9))
def test_a_resumed_prompt_stream_continues_as_if_uninterrupted(takes: list[int], untrained: int, count: int) -> None:
    whole = PromptStream(count, seed=3)
    drawn = [whole.take(k) for k in takes]
    cut = max(0, len(takes) - untrained)
    again = PromptStream(count, seed=3)
    for k in takes:
        again.take(k)
    resumed = PromptStream(count, seed=3)
    resumed.restore(json.loads(json.dumps(again.state([index for part in drawn[cut:] for index in part]))))
    assert [resumed.take(k) for k in takes[cut:]] == drawn[cut:]
    assert resumed.take(4) == whole.take(4)


def test_an_epoch_visits_every_prompt_once() -> None:
    stream = PromptStream(10, seed=1)
    assert sorted(stream.take(10)) == sorted(stream.take(10)) == list(range(10))


def test_an_epoch_by_solve_rate_begins_with_what_is_solved_half_of_the_time() -> None:
    stream = PromptStream(6, seed=1, by_solve_rate=True)
    rates = [0.0, 0.5, 1.0, 0.4, 0.9, 0.55]
    for index in stream.take(6):
        stream.observe(index, rates[index])
    resumed = PromptStream(6, seed=1, by_solve_rate=True)
    begun = stream.take(2)
    resumed.restore(json.loads(json.dumps(stream.state([]))))
    order = begun + stream.take(4)
    assert order[:4] == [1, 5, 3, 4] and set(order[4:]) == {0, 2}
    stream.observe(1, 0.0)  # the current epoch's order does not change
    assert resumed.take(4) == order[2:]


def test_saved_trees_of_tensors_are_read_back(tmp_path: Path) -> None:
    tree = {"a": torch.arange(3), "b": {0: {"x": torch.tensor(2.5), "n": 3}}, "c": [1, None, "s", torch.ones(2, 2)]}
    save_tree(tmp_path / "t.safetensors", tree)
    back = load_tree(tmp_path / "t.safetensors")
    assert torch.equal(back["a"], tree["a"]) and back["b"][0]["n"] == 3
    assert back["c"][:3] == [1, None, "s"] and torch.equal(back["c"][3], torch.ones(2, 2))


def test_wilson_intervals_match_the_textbook() -> None:
    low, high = wilson_interval(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson_interval(0, 20)[0] == 0.0 and wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="correct"):
        wilson_interval(3, 2)
    result = accuracy([True, False, True], ["a", "a", "b"])
    assert (result["correct"], result["by_task"]["b"]["n"]) == (2, 1)
