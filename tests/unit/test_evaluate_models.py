"""`lorapar evaluate --model`: its models, options, and the folder that it writes."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorapar_ray.adapters import attach_lora, residual_base, save_adapter
from lorapar_ray.cli import app
from lorapar_ray.engines.requests import Request
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.serving import NamedModel, named_model, serving
from lorapar_ray.evaluation.standalone import _require_same, by_base, evaluate_models, evaluation_of
from tests.unit.lm_eval_reference import Reference


def test_models_are_named_by_base_and_adapter(student: Path, tmp_path: Path) -> None:
    assert named_model(str(student)).adapter is None and serving(str(student), [None]) == {"sync": "merged"}
    for text, said in (
        (f"{student}+{tmp_path}/none", "--model"),
        (f"{tmp_path}/none", "no such directory"),
        (str(tmp_path), "holds no config.json"),
    ):
        with pytest.raises(UserError, match=said):
            named_model(text)


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


def test_a_folder_holds_answers_to_one_state_of_the_users_task_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "functions.py", "gsm8k.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "mine.yaml").write_text("doc_to_text: !function functions.ask\n")
    fields = {"tasks": ["mine.yaml", "gsm8k"], "data": {"gsm8k": "gsm8k.jsonl"}}
    asked, models, out = evaluation_of(["m"], fields, []), {"m": NamedModel("m", None)}, tmp_path / "out"
    _require_same(out, asked, models)
    (tmp_path / "functions.py").write_text("nothing is answered yet")
    _require_same(out, asked, models)
    (out / "answers").mkdir()
    for name in ("mine.yaml", "functions.py", "gsm8k.jsonl"):
        _require_same(out, asked, models)
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(before + "\n")
        with pytest.raises(UserError, match=f"holds results of '{name}' before its change"):
            _require_same(out, asked, models)
        (tmp_path / name).write_text(before)
    about = json.loads((out / "evaluation.json").read_text())
    del about["files"]  # as an earlier version wrote it
    (out / "evaluation.json").write_text(json.dumps(about))
    (tmp_path / "functions.py").write_text("")
    _require_same(out, asked, models)


@pytest.mark.slow
def test_a_refused_command_does_not_block_the_next(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text("{}")
    asked = evaluation_of([str(model)], {"tasks": ["lost.yaml"]}, [])
    with pytest.raises(UserError, match="no such task file"):
        evaluate_models(asked, out)
    assert not out.exists()
