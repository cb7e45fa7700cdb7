"""lm-eval with our model class: its requests and their answers are those of lm-eval's own class, also once stored."""

from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from lorapar_ray.config import EvaluateConfig
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.engines.requests import Answer, Request
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.answers import MERGED_FROM, AnswerStore
from lorapar_ray.evaluation.harness.catalogue import Catalogue, quiet, wanted
from lorapar_ray.evaluation.harness.model import HarnessModel, plan_scores
from lorapar_ray.evaluation.harness.run import evaluate_task
from tests.unit.lm_eval_reference import Reference, lines


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
