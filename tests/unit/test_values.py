"""Values in users' files; none is converted silently."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorapar_ray.config import Config
from lorapar_ray.datasets.named import NAMED
from lorapar_ray.datasets.prepare import prepare
from lorapar_ray.datasets.rows import COLUMNS, iterate_rows, read_table, write_rows
from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory

CHAT = [{"role": "system", "content": "You calculate."}, {"role": "user", "content": "1+1?"}]


def prepared(folder: Path, *sources: dict[str, Any], **data: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, rejects) of some sources."""
    train = [{"reader": "file", **source} for source in sources]
    config = Config.model_validate({"name": "x", "model": {"path": "m"}, "data": {"train": train, **data}})
    run = RunDirectory(folder / "run")
    prepare(config, run)
    rejects = run.rejects / "prepare.parquet"
    return read_table(run.data / "train.parquet"), read_table(rejects) if rejects.is_file() else []


def write(file: Path, *records: Any, opening: str = "", end: str = "\n") -> dict[str, Any]:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes((opening + "".join(json.dumps(record) + end for record in records)).encode())
    return {"path": str(file)}


def test_files_of_one_name_give_all_their_rows(tmp_path: Path) -> None:
    sources = [write(tmp_path / name / "train.jsonl", {"prompt": name, "answer": "1"}) for name in ("en", "de", "fr")]
    rows, _ = prepared(tmp_path, *sources)
    assert [row["id"] for row in rows] == ["train-0", "train-0@1", "train-0@2"]


@pytest.mark.parametrize("form", ["bom", "bom list", "crlf", "carriage return", "separators"])
def test_only_a_newline_ends_a_line_and_marks_are_no_text(tmp_path: Path, form: str) -> None:
    first, second = {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}
    file = tmp_path / "rows.jsonl"
    if form == "bom list":
        file.write_text("\ufeff" + json.dumps([first, second]))
        source = {"path": str(file)}
    elif form == "separators":
        second["prompt"] = "b\u2028c\u2029d\u0085e\x0cf"
        file.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in (first, second)))
        source = {"path": str(file)}
    else:
        end = {"crlf": "\r\n", "carriage return": "\r \n"}.get(form, "\n")
        source = write(file, first, second, opening="\ufeff" if form == "bom" else "", end=end)
    rows, _ = prepared(tmp_path, source)
    assert [row["prompt"] for row in rows] == ["a", second["prompt"]]


def test_chats_keep_their_roles(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"prompt": CHAT, "answer": "2"}, {"prompt": CHAT[1:] * 2, "answer": "2"})
    rows, _ = prepared(tmp_path, source, instruction="Number only.")
    assert rows[0]["prompt"] == "System: You calculate.\n\nUser: 1+1?\nNumber only."
    assert rows[0]["messages"] == [CHAT[0], {"role": "user", "content": "1+1?\nNumber only."}]


def test_questions_of_earlier_versions_are_read_as_before(tmp_path: Path) -> None:
    old = dict.fromkeys(COLUMNS, "x")
    table = pa.Table.from_pylist(
        [{**old, "messages": json.dumps(CHAT), "columns": '{"a": 1}'}, {**old, "messages": ""}]
    )
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist([old]), tmp_path / "older.parquet")
    first, second = iterate_rows(tmp_path / "train.parquet")
    assert (first.messages, first.columns, second.messages, second.columns) == (CHAT, '{"a": 1}', [], "")
    assert [row.messages for row in iterate_rows(tmp_path / "older.parquet")] == [[]]
    write_rows(tmp_path / "new.parquet", [first, second])
    assert list(iterate_rows(tmp_path / "new.parquet")) == [first, second]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": ["a"], "answer": "1"}, "row 0: its 'prompt' is a list; give text, or messages"),
        ({"prompt": [], "answer": "1"}, "its 'prompt' is a list"),
        ({"prompt": {"a": 1}, "answer": "1"}, "row 0: its 'prompt' is an object; give text or a number"),
        ({"prompt": [*CHAT, {"role": "assistant", "content": "2"}], "answer": "1"}, "ends with the assistant's"),
        ({"prompt": [{"role": "user", "content": ["x"]}], "answer": "1"}, "with 'role' and 'content' as text"),
        ({"prompt": "a", "answer": ["1"]}, "row 0: its 'answer' is a list"),
        ({"prompt": "a", "answer": True}, "row 0: its 'answer' is a boolean"),
        ({"prompt": "a", "answer": float("nan")}, "row 0: its 'answer' is not a finite number"),
        ({"prompt": "a", "answer": "1", "response": {"x": 1}}, "its 'response' is an object"),
    ],
)
def test_values_that_are_not_text_are_one_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, write(tmp_path / "rows.jsonl", record))


@pytest.mark.parametrize(("number", "text"), [(0.00001, "0.00001"), (42, "42"), (1e22, "1" + "0" * 22), (2.5, "2.5")])
def test_numbers_are_written_without_exponent(tmp_path: Path, number: float, text: str) -> None:
    rows, _ = prepared(tmp_path, write(tmp_path / "rows.jsonl", {"prompt": "a", "answer": number}))
    assert rows[0]["answer"] == text
    assert json.loads(rows[0]["columns"]) == {"answer": number}  # a reward gets it unchanged


def test_a_records_columns_keep_their_values_and_types_beside_other_records(tmp_path: Path) -> None:
    values: list[Any] = [
        1,
        2.5,
        1.0,
        "x",
        True,
        None,
        10**30,
        [1, "x", [None]],
        {},
        {"a": {"b": 1}},
        {"a": {"c": None}},
    ]
    columns = [{"answer": "1", "value": value} for value in values] + [{"answer": "1"}]
    rows, _ = prepared(
        tmp_path, write(tmp_path / "rows.jsonl", *({"prompt": f"q{at}", **each} for at, each in enumerate(columns)))
    )
    assert [repr(json.loads(row["columns"])) for row in rows] == [repr(each) for each in columns]


def test_rows_that_no_file_can_hold_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapar_ray.datasets.records.MAX_CHARACTERS", 1000)
    records = [{"prompt": "half \ud83d", "answer": "1"}, {"prompt": "x" * 5000, "answer": "1"}]
    records += [{"prompt": "b", "answer": "2", "other": "half \ud83d"}]
    plain = write(tmp_path / "rows.jsonl", *records)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(Path(plain["path"]).read_bytes()))
    for path in (plain["path"], f"{plain['path']}.gz"):
        rows, rejects = prepared(tmp_path, {"path": path})
        assert [row["prompt"] for row in rows] == ["b"]
        assert "surrogate pair" in rejects[0]["reason"] and rejects[1]["reason"].startswith("longer than")


def test_dolly_rows_without_an_answer_are_listed(tmp_path: Path) -> None:
    records = [{"instruction": name, "context": "", "response": answer} for name, answer in (("a", "A"), ("b", ""))]
    rows, rejects = prepared(tmp_path, {**write(tmp_path / "dolly.jsonl", *records), "reader": "dolly"})
    assert [row["prompt"] for row in rows] == ["a"]
    assert rejects[0]["reason"] == "no answer in the published data"


def answer_of(reader: str, **record: Any) -> str:
    return str(NAMED[reader].convert(record)[2])


def test_answers_of_benchmarks() -> None:
    for value, want in (("yes", "yes"), ("Yes", "yes"), (True, "yes"), ("true", "yes"), (1, "yes"), ("no", "no")):
        assert answer_of("boolq", passage="p", question="q", answer=value) == want
    for value, want in (("false", "no"), (False, "no"), (0, "no")):
        assert answer_of("boolq", passage="p", question="q", answer=value) == want
    for value, want in ((0, "A"), (3, "D"), ("B", "B"), ("b", "B"), ("2", "C")):
        assert answer_of("mmlu", question="q", choices=list("wxyz"), answer=value) == want
    for number, want in ((0.00001, "0.00001"), ("3.0", "3"), (7, "7"), (7.0, "7"), ("1,234", "1234"), ("1e3", "1000")):
        assert answer_of("svamp", Body="b", Question="q", Answer=number) == want
    assert answer_of("gsm8k", question="q", answer="5+6=11\n#### 1,011") == "1,011"


@pytest.mark.parametrize(
    ("reader", "record"),
    [
        ("boolq", {"passage": "p", "question": "q", "answer": "maybe"}),
        ("boolq", {"passage": "p", "question": "q", "answer": None}),
        *(("mmlu", {"question": "q", "choices": list("wxyz"), "answer": each}) for each in (4, -1, "E", "", True, 1.5)),
        ("mmlu", {"question": "q", "choices": "wxyz", "answer": 1}),
        *(("svamp", {"Body": "b", "Question": "q", "Answer": each}) for each in (float("nan"), "inf", "five", True)),
        ("gsm8k", {"question": "q", "answer": "no mark"}),
        ("gsm8k", {"question": ["q"], "answer": "#### 1"}),
    ],
)
def test_answers_that_a_benchmark_cannot_have_are_one_line(tmp_path: Path, reader: str, record: Any) -> None:
    with pytest.raises(UserError, match="row 0"):
        prepared(tmp_path, {**write(tmp_path / "rows.jsonl", record), "reader": reader})


def test_short_floats_of_a_table_are_the_decimals_that_were_meant(tmp_path: Path) -> None:
    """Of 32 bits, 0.1 is 0.10000000149011612 of 64: no answer of a model would equal it."""
    numbers = [0.1, 2.5, 1e-7, 16777216.0, None]
    columns = {
        "prompt": pa.array([f"q{number}" for number in range(5)]),
        "answer": pa.array(numbers, pa.float32()),
        "half": pa.array([0.1] * 5, pa.float16()),
        "more": pa.array([[0.3, None]] * 5, pa.list_(pa.float32())),
        "deep": pa.array([{"x": 0.7}] * 5, pa.struct([("x", pa.float32())])),
        "double": pa.array([0.1] * 5, pa.float64()),
        "response": pa.array(["r"] * 5),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows, _ = prepared(tmp_path, {"path": str(tmp_path / "rows.parquet")})
    assert [row["answer"] for row in rows] == ["0.1", "2.5", "0.0000001", "16777216.0", "r"]
    kept = json.loads(rows[0]["columns"])
    assert (kept["half"], kept["more"], kept["deep"], kept["double"]) == (0.1, [0.3, None], {"x": 0.7}, 0.1)
    hub = {"reader": "hub", "name": str(tmp_path / "set")}
    (tmp_path / "set").mkdir()
    (tmp_path / "rows.parquet").rename(tmp_path / "set" / "train.parquet")
    assert prepared(tmp_path / "hub", hub)[0][0]["answer"] == "0.1"


def test_a_folder_as_a_data_path_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\[0\]: '.*' is a folder; name a file in it"):
        prepared(tmp_path, {"path": str(tmp_path)})
