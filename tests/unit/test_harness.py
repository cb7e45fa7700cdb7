"""lm-eval with our model class: requests, stored answers, tasks by name and from local files, verdicts, and reports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorapar_ray.adapters import attach_lora, residual_base, save_adapter
from lorapar_ray.cli import app
from lorapar_ray.config import EvaluateConfig
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.engines.requests import Answer, Request
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.answers import MERGED_FROM, AnswerStore
from lorapar_ray.evaluation.harness import judges
from lorapar_ray.evaluation.harness.catalogue import OUR_TASKS, Catalogue, quiet, wanted
from lorapar_ray.evaluation.harness.command import WithOurTasks
from lorapar_ray.evaluation.harness.local_data import local_dataset
from lorapar_ray.evaluation.harness.model import HarnessModel, plan_scores
from lorapar_ray.evaluation.harness.results import leaves, summary
from lorapar_ray.evaluation.harness.run import evaluate_task
from lorapar_ray.evaluation.serving import NamedModel, named_model, serving
from lorapar_ray.evaluation.standalone import _require_same, by_base, evaluate_models, evaluation_of
from lorapar_ray.evaluation.task_files import file_name, result_file, rows_file
from lorapar_ray.evaluation.tasks import catalogue_of
from lorapar_ray.reporting.evaluation_page import (
    Found,
    comparisons,
    failures,
    read_found,
    read_run_found,
    write_page,
    wrong_answers,
)
from lorapar_ray.runs import RunDirectory, write_json
from tests.unit.test_sandbox_problems import DATA

SPLIT = "test"


class Reference:
    """Answers requests with transformers, one at a time: the simplest implementation of each request."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.asked: list[Request] = []

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        self.asked += requests
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        ids = list(request.ids)
        if request.kind == "generate":
            ends = set(request.sampling["stop_token_ids"])
            tokens: list[int] = []
            while len(tokens) < request.sampling["max_tokens"] and not ends & set(tokens):
                tokens.append(int(self._logprobs([*ids, *tokens])[-1].argmax()))
            return Answer(request.key, tokens=tokens)
        logprobs = self._logprobs(ids)
        if request.kind == "choose":
            last = logprobs[-1]
            return Answer(
                request.key,
                logprobs=[float(last[token]) for token in request.targets],
                greedy=[int(last.argmax()) == token for token in request.targets],
            )
        places = range(request.start, len(ids))
        return Answer(
            request.key,
            logprobs=[float(logprobs[at - 1, ids[at]]) for at in places],
            greedy=[int(logprobs[at - 1].argmax()) == ids[at] for at in places],
        )

    def _logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, at) for at, args in enumerate(arguments)]


def test_requests_are_answered_like_lm_evals_hf_class(student: Path) -> None:
    ours = HarnessModel(Reference(student), load_encoder(str(student), None), 128)
    theirs = HFLM(pretrained=str(student), device="cpu", dtype="float32", batch_size=2, max_length=127)
    pairs = [
        ("The sky is", " blue"),
        ("The sky is", " red"),
        ("The sky is ", "blue and wide"),
        ("", "No context at all"),
        ("word " * 200, "cut from the left"),
    ]
    for a, b in zip(
        ours.loglikelihood(requests("loglikelihood", *pairs)),
        theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True),
        strict=True,
    ):
        assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
    long = ("A text of more than one window. " * 30,)
    [a], [b] = (model.loglikelihood_rolling(requests("loglikelihood_rolling", long)) for model in (ours, theirs))
    assert a == pytest.approx(b, rel=0.05)  # their windows are a token longer
    settings = {"until": ["e"], "max_gen_toks": 8, "do_sample": False}
    asked = requests(
        "generate_until", ("Question: 2 + 2?\nAnswer:", settings), ("Once upon", {**settings, "until": []})
    )
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_continuations_of_one_token_are_requested_together() -> None:
    plan = plan_scores([([5, 6], [7]), ([5, 6], [8]), ([5, 6], [7, 8]), ([9], [7]), ([5, 6], [7])], 10)
    assert [(request.kind, tuple(request.ids), tuple(request.targets)) for request in plan.requests] == [
        ("choose", (5, 6), (7, 8)),
        ("score", (5, 6, 7, 8), ()),
        ("choose", (9,), (7,)),
    ]
    assert plan.places == [(0, 0), (0, 1), (1, None), (2, 0), (0, 0)] and plan.requests[1].start == 2
    cut = plan_scores([([1, 2, 3, 4], [5, 6])], 3).requests[0]
    assert (cut.ids, cut.start) == ([4, 5, 6], 1)
    assert plan_scores([([1], [])], 3).requests[0].start == 1
    with pytest.raises(UserError, match="max_model_len"):
        plan_scores([([1], [5, 6, 7])], 3)


def test_answers_are_found_again(tmp_path: Path) -> None:
    asked = [Request("generate", [1, place], sampling={"max_tokens": 3}) for place in range(MERGED_FROM + 5)]
    assert len({request.key for request in asked}) == len(asked)
    assert Request("generate", [1], repeat=1).key != Request("generate", [1]).key != Request("score", [1]).key
    store = AnswerStore(tmp_path / "answers")
    for request in asked[:-2]:
        store.add([Answer(request.key, tokens=list(request.ids))])
    assert len(list((tmp_path / "answers").glob("*.parquet"))) < MERGED_FROM / 2
    again = AnswerStore(tmp_path / "answers")
    assert [request.key for request in again.missing([*asked, *asked])] == [request.key for request in asked[-2:]]
    assert again[asked[3].key].tokens == [1, 3]
    assert pyarrow.dataset.dataset(tmp_path / "answers").count_rows() == len(asked) - 2
    (tmp_path / "answers" / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"x\.parquet' is damaged"):
        AnswerStore(tmp_path / "answers")


def lines(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


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


def test_numbers_are_judged_in_another_process_within_limits() -> None:
    docs = [{"question": "1 + 1?", "answer": "2"}] * 2
    long = "The answer is " + "9" * 10_000
    assert judges.numeric([["It is 2.", "It is 3."], [long, "2.0"]], docs) == [[1.0, 0.0], [0.0, 1.0]]


def test_programs_are_judged_in_the_sandbox() -> None:
    doc = {
        "prompt": 'def double(n):\n    """Twice n."""\n',
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    }
    verdicts = judges.humaneval([["    return 2 * n\n", "    return n\n"]], [doc])
    assert verdicts == [[1.0, 0.0]] and judges.right([], verdicts) == 0.5
    with judges.judged_by(judges.SandboxConfig(), 2):
        assert judges.right([], verdicts) == 1.0
    assert judges.mbpp([["def f(n):\n    return n\n"]], [{"test_list": ["assert f(1) == 1"]}]) == [[1.0]]
    assert [shot["task_id"] for shot in judges.mbpp_shots()] == [2, 3, 4]


def test_samples_and_their_k() -> None:
    with pytest.raises(ValueError, match="pass@4 needs at least 4 samples of each question; samples is 2"):
        EvaluateConfig(pass_at=4, samples=2, temperature=1.0)
    with pytest.raises(ValueError, match="greedy answers are all the same"):
        EvaluateConfig(samples=2)
    with (
        pytest.raises(UserError, match=r"pass@k: k = 3 needs at least 3 samples"),
        judges.judged_by(judges.SandboxConfig(), 3),
    ):
        judges.right([], [[1.0, 0.0]])


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        {
            "question": f"Which is {word}?",
            "choices": {"text": [word, "another thing", "no"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[place % 3],
        }
        for place, word in enumerate(("red", "blue", "green", "a very long answer", "grey"))
    ]
    return lines(tmp_path_factory.mktemp("arc") / "test.jsonl", *rows)


def test_a_task_is_reported_as_lm_eval_reports_it(student: Path, arc: str, tmp_path: Path) -> None:
    encoder, found = load_encoder(str(student), None), Catalogue({"arc_easy": arc})
    settings = EvaluateConfig(limit=4)
    rows, shares = evaluate_task(found, wanted("arc_easy@0"), settings, Reference(student), encoder)
    with quiet():
        hf = HFLM(pretrained=str(student), device="cpu", dtype="float32", batch_size=4)
        theirs = evaluate(hf, found.load(wanted("arc_easy@0")), limit=4, bootstrap_iters=0)
    assert {(row["id"], row["metric"]): row["value"] for row in rows} == {
        (str(sample["doc_id"]), metric): sample[metric]
        for sample in theirs["samples"]["arc_easy"]
        for metric in ("acc", "acc_norm")
    }
    assert {share["metric"]: share["accuracy"] for share in shares} == {
        metric: theirs["results"]["arc_easy"][f"{metric},none"] for metric in ("acc", "acc_norm")
    }
    assert all(share["n"] == 4 and share["interval"][0] < share["accuracy"] + 1e-9 for share in shares)


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


def test_a_model_without_a_chat_template_is_one_line(student: Path, arc: str) -> None:
    encoder = load_encoder(str(student), None)
    encoder.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        evaluate_task(
            Catalogue({"arc_easy": arc}), wanted("arc_easy@0"), EvaluateConfig(chat=True), Reference(student), encoder
        )


def test_a_chat_is_written_by_the_models_template(student: Path, arc: str) -> None:
    encoder, reference = load_encoder(str(student), "Be brief."), Reference(student)
    settings = EvaluateConfig(chat=True, limit=1)
    rows, _ = evaluate_task(Catalogue({"arc_easy": arc}), wanted("arc_easy@0"), settings, reference, encoder)
    prompt = rows[0]["prompt"]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>") and prompt.endswith("<|im_start|>assistant\n")


def test_models_are_named_by_base_and_adapter(student: Path, tmp_path: Path) -> None:
    assert named_model(str(student)).adapter is None and serving(str(student), [None]) == {"sync": "merged"}
    for text, said in (
        (f"{student}+{tmp_path}/none", "--model"),
        (f"{tmp_path}/none", "no such directory"),
        (str(tmp_path), "holds no config.json"),
    ):
        with pytest.raises(UserError, match=said):
            named_model(text)


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "m"], "--out: needed with --model"),
        (["--tasks", "gsm8k"], "--tasks: belongs to --model"),
        ([], "give --config of a run, or --model"),
        (["--model", "m", "--config", "c.yaml", "--out", "o"], "remove --config"),
        (["--model", "m", "--out", "o", "--data", "gsm8k"], "is not NAME=PATH"),
        (["--model", "m", "--out", "o", "--tasks", "a", "--limit", "0"], "'limit'"),
        (["--model", "m", "--out", "o", "--tasks", "a", "--set", "sft.epochs=3"], "--set 'sft': has no meaning here"),
        (["--model", "m", "--out", "o"], "--tasks: none given"),
        (["--model", "./nowhere", "--out", "o", "--tasks", "gsm8k"], "model './nowhere': no such directory"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert isinstance(done.exception, UserError) and said in str(done.exception), done.exception


def test_a_missing_lm_eval_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapar_ray.evaluation.harness.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'lorapar-ray\[eval\]'"):
        catalogue_of(EvaluateConfig(tasks=["gsm8k"]))


def test_programs_that_nothing_can_confine_are_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(layer: str) -> None:
        raise UserError(f"sandbox.layer: {layer} does not work here")

    monkeypatch.setattr("lorapar_ray.sandbox.choose", broken)
    file = lines(tmp_path / "h.jsonl", {"task_id": "x", "prompt": "p", "entry_point": "f", "test": "t"})
    with pytest.raises(UserError, match=r"sandbox\.layer: auto does not work here"):
        catalogue_of(EvaluateConfig(tasks=["humaneval"], data={"humaneval": file}))


def test_an_adapter_on_a_residual_base_is_named_with_it(student: Path, tmp_path: Path) -> None:
    model = attach_lora(
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32), rank=2, alpha=4, targets="qkv", init="pissa"
    )
    save_adapter(model, tmp_path / "adapter")
    residual_base(model).save_pretrained(tmp_path / "base")
    named = named_model(f"{tmp_path}/base+{tmp_path}/adapter")
    assert (named.base, named.adapter) == (str(tmp_path / "base"), tmp_path / "adapter")
    kept, merged = Reference(tmp_path / "base"), Reference(student)
    kept.model = PeftModel.from_pretrained(kept.model, named.adapter).eval()
    asked = [Request("score", [5, 6, 7, 8], start=1)]
    assert kept(asked)[0].logprobs == pytest.approx(merged(asked)[0].logprobs, abs=1e-3)  # untrained: the base itself


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


def test_models_with_the_same_base_share_engines(student: Path) -> None:
    models = {"a": str(student), "b": f"{student.parent}/./{student.name}", "c": "package:smollm2-135m-instruct"}
    assert by_base({name: NamedModel(base, None) for name, base in models.items()}) == [["a", "b"], ["c"]]


def test_settings_bind_a_folder_from_its_first_answer_on(tmp_path: Path) -> None:
    plain, chat = (evaluation_of(["m"], {"tasks": ["gsm8k"], "chat": chat}, []) for chat in (False, True))
    models = {"m": NamedModel("m", None)}
    _require_same(tmp_path, chat, models)
    _require_same(tmp_path, plain, models)  # the model had no chat template
    (tmp_path / "answers").mkdir()
    _require_same(tmp_path, plain, models)
    with pytest.raises(UserError, match=r"with another evaluate\.chat \(False, now True\)"):
        _require_same(tmp_path, chat, models)
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"holds no evaluation\.json"):
        _require_same(tmp_path, plain, models)


@pytest.mark.slow
def test_a_refused_command_does_not_block_the_next(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text("{}")
    asked = evaluation_of([str(model)], {"tasks": ["nonsense"]}, [])
    with pytest.raises(UserError, match="nonsense"):
        evaluate_models(asked, out)
    assert not out.exists()
