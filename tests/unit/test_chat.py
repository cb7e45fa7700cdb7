"""Prompts as tokens, where an answer ends, and what happens to prompts that are too long."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from lorapar_ray.boundary import read_lines
from lorapar_ray.config import Config
from lorapar_ray.datasets import labelled
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.datasets.labelled import require_room, token_table
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.datasets.tokens import Selection, TokenTable, write_tokens
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.judging import judge, judging_process
from lorapar_ray.models import resolve_model
from lorapar_ray.runs import RunDirectory
from lorapar_ray.tracking import append_line, keep_lines_until

TEXT_END, TURN_END = 0, 2
"""`<|endoftext|>` and `<|im_end|>` of the tokenizer."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer like that of many chat models: documents end with one token, turns with another."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("package:smollm2-135m-instruct"))
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


def test_an_answer_ends_with_the_templates_token(published: Path) -> None:
    encoder = load_encoder(str(published), None)
    assert (encoder.end_id, encoder.end_ids) == (TURN_END, [TURN_END, TEXT_END])
    assert encoder.response_ids("4")[-1] == TURN_END
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": [TURN_END, 7]}))
    assert load_encoder(str(published), None).end_ids == [TURN_END, TEXT_END, 7]
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "max_new_tokens": -1}))
    assert load_encoder(str(published), None).end_ids == [TURN_END, TEXT_END, 7]
    for damage in ('{"eos_token_id": [0', "[]", '{"eos_token_id": "7"}', '{"eos_token_id": [7, null]}'):
        (published / "generation_config.json").write_text(damage)
        with pytest.raises(UserError, match=r"generation_config\.json'"):
            load_encoder(str(published), None)
    (published / "generation_config.json").unlink()
    for config in ({"eos_token_id": [9]}, {"text_config": {"eos_token_id": 9}}):
        (published / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        assert load_encoder(str(published), None).end_ids == [TURN_END, TEXT_END, 9]
    (published / "config.json").unlink()


def test_what_follows_the_end_or_a_stop_string_is_not_judged(published: Path) -> None:
    encoder = load_encoder(str(published), None)
    ids = encoder.tokenizer("The answer is 4")["input_ids"]
    further = encoder.tokenizer("user: and 5?")["input_ids"]
    for end in (TURN_END, TEXT_END):
        assert encoder.answer_text([*ids, end, *further]) == "The answer is 4"
    assert encoder.answer_text(ids, stop=[" is", " answer"]) == "The"


def test_a_chat_keeps_its_roles(published: Path) -> None:
    encoder = load_encoder(str(published), "You are the config's.")
    chat = [{"role": "system", "content": "You are the data's."}, {"role": "user", "content": "2+2?"}]
    text = encoder.prompt_text(chat)
    assert "system\nYou are the data's." in text and "config's" not in text
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert encoder.prompt_text(turns).count("<|im_start|>") == 5  # + system prompt and answer's beginning


def test_a_template_that_refuses_is_one_line(published: Path) -> None:
    encoder = load_encoder(str(published), "You are.")
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"refuses .* system, user \(no system role\); leave model.system_prompt out"):
        encoder.prompt_text("2+2?")
    assert replace(encoder, system_prompt=None).prompt_text("2+2?") == "2+2?"
    encoder.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template, and the data's prompts are lists of messages"):
        encoder.prompt_text([{"role": "user", "content": "2+2?"}])


def long_and_short() -> list[dict[str, Any]]:
    row = {"response": "4", "answer": "4", "task": "", "difficulty": "", "system": 1}
    return [{"id": "short", "prompt": "2+2?", **row}, {"id": "long", "prompt": "2+2? " * 50, **row}]


@pytest.mark.parametrize("stage", ["sft", "grpo", "evaluate"])
def test_prompts_that_are_too_long_are_listed(tmp_path: Path, published: Path, stage: str) -> None:
    encoder, run = load_encoder(str(published), None), RunDirectory(tmp_path)

    def fitting(rows: list[dict[str, Any]], limit: int = 64) -> list[dict[str, Any]]:
        write_tokens([rows], encoder, tmp_path / "tokens.arrow", "")
        table, chosen = TokenTable(tmp_path / "tokens.arrow"), Selection("", [1], "sft.systems", limit)
        require_room(run, table, [chosen], stage=stage, field=f"{stage}.limit", of_prompt=stage == "grpo")
        return [{"id": table.id(position)} for position in chosen.positions(table)]

    assert [row["id"] for row in fitting(long_and_short())] == ["short"]
    (rejected,) = read_table(run.rejects / f"{stage}.parquet")
    assert rejected["id"] == "long" and rejected["prompt"].startswith("2+2?")
    with pytest.raises(UserError, match=rf"{stage}\.\w+: .*; raise it"):
        fitting(long_and_short(), limit=4)
    assert len(fitting(long_and_short()[:1])) == 1
    assert not (run.rejects / f"{stage}.parquet").exists()


@pytest.mark.slow
def test_the_driver_judges_behind_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapar_ray.evaluation.judging.TIME_LIMIT_S", 2.0)
    rows = [{"prompt": "q", "answer": want} for want in ("4", "9", r"\sqrt{2}", r"2\sqrt{3}")]
    texts = ["It is 4.", "9^{9^{9^{9}}}", r"\boxed{\sqrt{2}^{9^{9^9}}}", r"\boxed{\sqrt{12}}"]
    with judging_process("numeric") as process:
        right, lost = judge(process, rows, texts)
    assert right == [True, False, False, True] and lost <= 1


def test_tokens_are_written_again_for_what_has_changed_or_is_damaged(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def here(work: Any, *arguments: Any, **_: Any) -> None:
        made.append("made")
        work(*arguments)

    monkeypatch.setattr(labelled, "on_a_worker", here)  # the work itself, without a cluster
    model, run = tmp_path / "model", RunDirectory(tmp_path / "run")
    shutil.copytree(published, model)
    (model / "config.json").write_text('{"model_type": "llama"}')
    run.labels.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(long_and_short()), run.labels / "part-00000.parquet")
    tree = {"name": "r", "model": {"path": str(model)}, "data": {"train": [{"reader": "file", "path": "x"}]}}
    config = Config.model_validate(tree)
    whole = TokenTable(token_table(config, run)).tokens(1).tolist()
    os.utime(run.labels / "part-00000.parquet", (1, 1))
    file = token_table(config, run)
    assert made == ["made"]
    content = bytearray(file.read_bytes())
    content[content.index(whole[-1].to_bytes(4, "little"))] ^= 1
    for damage in (bytes(content), bytes(content[:200])):
        file.write_bytes(damage)
        assert TokenTable(token_table(config, run)).tokens(1).tolist() == whole
    assert len(made) == 3
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|im_end|>"}))
    token_table(config, run)
    assert len(made) == 4


def test_only_a_newline_ends_a_line_of_metrics(tmp_path: Path) -> None:
    file, odd = tmp_path / "samples.jsonl", "a\u2028b\u2029c\u0085d\x0be\ud83df\r"
    append_line(file, {"step": 1, "text": odd})
    with file.open("a") as lines:
        lines.write('{"step": 2, "te')  # killed here
    assert read_lines(file) == [{"step": 1, "text": odd}]
    keep_lines_until(file, 1)
    append_line(file, {"step": 2, "text": odd})
    assert [line["step"] for line in read_lines(file)] == [1, 2]
    assert read_lines(tmp_path / "none.jsonl") == []
