"""lm-eval's tasks by name and from local files."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.config import EvaluateConfig
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.harness.catalogue import OUR_TASKS, Catalogue, wanted
from lorapar_ray.evaluation.harness.command import WithOurTasks
from lorapar_ray.evaluation.harness.local_data import local_dataset
from lorapar_ray.evaluation.harness.results import leaves
from lorapar_ray.evaluation.task_files import file_name
from lorapar_ray.evaluation.tasks import catalogue_of
from tests.unit.lm_eval_reference import lines
from tests.unit.test_sandbox_problems import DATA

SPLIT = "test"


GSM8K = {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}


LLM_ADAPTERS = (
    "Please choose the correct answer to the question: Which is a fruit?\n\nAnswer1: stone Answer2: an apple"
    " Answer3: iron\n\nAnswer format: answer1/answer2/answer3"
)


@pytest.mark.parametrize(
    ("family", "record", "row"),
    [
        ("gsm8k", GSM8K, GSM8K),
        (
            "mmlu",
            {"subject": "s", "question": "q", "choices": ["a", "b", "c", "d"], "answer": "C"},
            {"subject": "s", "question": "q", "choices": ["a", "b", "c", "d"], "answer": 2},
        ),
        (
            "arc_easy",
            {"instruction": LLM_ADAPTERS, "answer": "answer2"},
            {
                "question": "Which is a fruit?",
                "choices": {"text": ["stone", "an apple", "iron"], "label": ["1", "2", "3"]},
                "answerKey": "2",
            },
        ),
        (
            "arc_challenge",
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        ),
        (
            "boolq",
            {"question": "is it so", "passage": "It is.", "answer": True},
            {"question": "is it so", "passage": "It is.", "label": 1},
        ),
        (
            "boolq",
            {
                "instruction": "Please answer the following question with true or false, question: is it?\n\nA",
                "answer": "false",
            },
            {"question": "is it", "label": 0},
        ),
        (
            "svamp",
            {"Body": "Dan had 3", "Question": "How many?", "Answer": 51.0},
            {"question": "Dan had 3. How many?", "answer": "51"},
        ),
        ("mawps", {"original_text": "Add .5 ?", "ans": 2.5}, {"question": "Add .5 ?", "answer": "2.5"}),
        (
            "mbpp",
            {"task_id": 11, "text": "t", "code": "c", "test_list": ["assert f(1)"], "test_setup_code": ""},
            {"text": "t", "code": "c", "test_list": ["assert f(1)"], "test_setup_code": ""},
        ),
    ],
)
def test_local_files_as_their_authors_publish_them(tmp_path: Path, family: str, record: Any, row: Any) -> None:
    found = local_dataset(family, lines(tmp_path / "questions.jsonl", record), SPLIT)
    assert found[SPLIT][0] == row


def test_splits_go_by_the_files_names(tmp_path: Path) -> None:
    for name in ("mmlu_dev", "mmlu_test"):
        lines(tmp_path / f"{name}.jsonl", {"subject": "s", "question": name, "choices": ["a", "b"], "answer": 0})
    found = local_dataset("mmlu", str(tmp_path), SPLIT, "s")
    assert {split: rows[0]["question"] for split, rows in found.items()} == {"dev": "mmlu_dev", "test": "mmlu_test"}
    lines(tmp_path / "more_test.jsonl", {})
    with pytest.raises(UserError, match="two files for its test questions"):
        local_dataset("mmlu", str(tmp_path), SPLIT)
    lines(tmp_path / "HumanEval.jsonl", {"task_id": "x", "prompt": "p", "entry_point": "f", "test": "t"})
    assert set(local_dataset("humaneval", str(tmp_path / "HumanEval.jsonl"), SPLIT)) == {"test"}


def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue({"gsm8k": lines(tmp_path / "gsm8k.jsonl", GSM8K)}, [str(tmp_path)])


@pytest.mark.parametrize(
    ("data", "task", "said"),
    [
        ({"gsm8k": [{"question": "q"}]}, "gsm8k@0", "row 1 has no column 'answer'; it has question"),
        ({"gsm8k": [GSM8K]}, "gsm8k@8", "shows 8 examples, and its data has none beside the test questions"),
        ({"boolq": [{"instruction": "question: is it?", "answer": "true"}]}, "boolq", "lacks ('passage' is undefined)"),
        ({"arc_easy": [{"question": "q", "choices": {"text": [], "label": []}, "answerKey": "A"}]}, "arc_easy", "'A'"),
        ({"gsm8k": None}, "gsm8k", "no such file or folder"),
        ({"gsm8k": [GSM8K]}, "gsm8k@x", "NAME@SHOTS"),
        ({"gsm8q": [GSM8K]}, "gsm8k", "cannot be given as a file"),
        ({}, "lost.yaml", "no such task file"),
        ({}, "broken.yaml", "is not a task file of lm-eval (ScannerError: mapping values are not allowed"),
        ({}, "text.yaml", "is not a task file of lm-eval (ValueError: Expected YAML dict from"),
        ({}, "mawps", "give a file, --data mawps=FILE"),
        ({}, "mine.yaml", "reads a column that its data lacks ('hint' is undefined)"),
        ({}, "unsafe.yaml", "runs a model's programs in this process, which is refused"),
    ],
)
def test_an_unsupported_task_is_one_line(tmp_path: Path, data: dict[str, Any], task: str, said: str) -> None:
    own = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": lines(tmp_path / "rows.jsonl", GSM8K)}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}} {{hint}}",
        "doc_to_target": "{{answer}}",
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(own))
    (tmp_path / "unsafe.yaml").write_text(json.dumps(own | {"task": "unsafe", "unsafe_code": True}))
    (tmp_path / "broken.yaml").write_text("task: broken\n  test_split: [")
    (tmp_path / "text.yaml").write_text("no mapping")
    paths = {
        family: str(tmp_path / "none") if rows is None else lines(tmp_path / f"{family}.jsonl", *rows)
        for family, rows in data.items()
    }
    place = str(tmp_path / task) if task.endswith("yaml") else task
    with pytest.raises(UserError) as raised:
        Catalogue(paths).load(wanted(place))
    assert said in str(raised.value) and "\n" not in str(raised.value), raised.value


def test_an_unknown_task_names_similar_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = catalogue(tmp_path)
    monkeypatch.setattr(found, "_own", found._own)
    monkeypatch.setattr(found, "_managed", lambda *_, **__: found._manager)  # reading all 13,000 names takes 15 s
    with pytest.raises(UserError, match=r"no task 'gsmk8'; did you mean gsm8k"):
        found.load(wanted("gsmk8"))
    (tmp_path / "mine.yaml").write_text("task: mine\n  test_split: [")
    with pytest.raises(UserError, match=r"no task 'mine', and '.*mine\.yaml' is no task file \("):
        found.load(wanted("mine"))


def test_a_missing_lm_eval_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapar_ray.evaluation.harness.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'lorapar-ray\[eval\]'"):
        catalogue_of(EvaluateConfig(tasks=["gsm8k"]))


def test_lm_evals_own_commands_know_our_tasks_and_a_users(tmp_path: Path) -> None:
    mine = {"task": "humaneval", "dataset_path": "json", "output_type": "generate_until"}
    (tmp_path / "mine.yaml").write_text(json.dumps(mine))
    found = {path: WithOurTasks(include_path=path, include_defaults=False) for path in (None, str(tmp_path))}
    assert {"svamp", "mawps", "mbpp", "boolq_closed_book"} <= set(found[None].all_tasks)
    places = {path: each.task_index["humaneval"].yaml_path for path, each in found.items()}
    assert places == {None: OUR_TASKS / "humaneval.yaml", str(tmp_path): tmp_path / "mine.yaml"}


def test_tasks_are_file_names() -> None:
    assert [file_name(text) for text in ("gsm8k@8", "mine/my task.yaml@0", "mmlu")] == ["gsm8k@8", "my_task@0", "mmlu"]
    with pytest.raises(UserError, match="would have the same file name"):
        catalogue_of(EvaluateConfig(tasks=["a/mine.yaml", "b/mine.yaml"]))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the public data sets")
def test_real_files_are_read_whole() -> None:
    data = {
        "gsm8k": "gsm8k",
        "mmlu": "mmlu",
        "arc_easy": "llm_adapters/ARC-Easy",
        "boolq": "llm_adapters/boolq",
        "svamp": "svamp/SVAMP.json",
        "mawps": "llm_adapters/mawps/testset.json",
        "humaneval": "humaneval",
        "mbpp": "mbpp/mbpp.jsonl",
    }
    found = Catalogue({family: str(DATA / path) for family, path in data.items()})
    names = ("gsm8k@8", "arc_easy@2", "boolq_closed_book", "svamp", "mawps", "humaneval", "mbpp", "mmlu@5")
    loaded = {name: found.load(wanted(name)) for name in names}
    questions = {name: sum(len(task.eval_docs) for task in each["tasks"].values()) for name, each in loaded.items()}
    assert questions == dict(zip(names, (1319, 2376, 3270, 1000, 238, 164, 500, 14042), strict=True))
    groups = leaves(loaded["mmlu@5"]["groups"])
    assert len(groups["mmlu"]) == 57 and "mmlu_anatomy" in groups["mmlu_stem"]
