"""What `lorapar serve` checks before a request reaches the engine, and how `auto` chooses."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from lorapar_ray.cli import app
from lorapar_ray.config import Config
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.models import resolve_model
from lorapar_ray.runs import RunDirectory
from lorapar_ray.serving.job import (
    KEY,
    Address,
    _server,
    finished_adapters,
    labelled_questions,
    require_free,
    server_key,
)
from lorapar_ray.serving.openai_side import PLAIN
from lorapar_ray.serving.requests import (
    MOST_BYTES,
    BadRequest,
    body_of,
    digest_of,
    ending_as_trained,
    parsed,
    question_in,
    require_key,
    with_training_prompt,
    within_limits,
)
from lorapar_ray.serving.routing import fit_threshold, routing_prompt, stages_by_system


def config(**sections: Any) -> Config:
    tree = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"reader": "file", "path": "rows.jsonl"}]}}
    return Config.model_validate(tree | sections)


@pytest.mark.parametrize(
    ("system1", "system2", "log_odds", "agreement"),
    [
        ([-3.0, -2.0], [1.0, 4.0], -0.5, 1.0),
        ([5.0, 6.0], [8.0, 9.0], 7.0, 1.0),  # a model that is biased towards System 2
        ([0.0, 1.0, 2.0, 10.0], [3.0, 4.0], 2.5, 0.875),
        ([1.0, 1.0], [1.0], 2.0, 0.5),
    ],
)
def test_the_threshold_parts_the_labelled_questions_best(
    system1: list[float], system2: list[float], log_odds: float, agreement: float
) -> None:
    found = fit_threshold(system1, system2)
    assert (found.log_odds, found.agreement) == (log_odds, agreement)


def test_the_student_reads_the_run_s_own_prompt_and_no_answer() -> None:
    text = routing_prompt(config(), "Small", "What is 2 + 3?")
    assert text.startswith("Act as the language model Small. ")
    assert text.endswith("\n\nQuestion: What is 2 + 3?\nAnswer:\nSystem:")


def test_auto_needs_two_stages_for_the_two_systems() -> None:
    assert stages_by_system(config()) == {1: "sft", 2: "grpo"}
    assert stages_by_system(config(order=["sft"])) == {}
    assert stages_by_system(config(sft={"systems": [1, 2]})) == {}


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (json.dumps({"prompt": ["x"] * 65}).encode(), 400, "prompt: at most 64"),
    ],
)
def test_requests_beyond_the_limits(body: bytes, status: int, why: str) -> None:
    with pytest.raises(BadRequest, match=why) as refused:
        parsed(body)
    assert refused.value.status == status
    assert refused.value.body["error"]["code"] == status


def test_a_body_that_is_too_large_is_not_read_to_its_end() -> None:
    read = []

    async def arriving() -> AsyncIterator[bytes]:
        for part in range(64):
            read.append(part)
            yield b" " * (MOST_BYTES // 4)

    for headers, parts in (({"content-length": str(MOST_BYTES + 1)}, 0), ({"content-length": "9" * 5000}, 0), ({}, 5)):
        read.clear()
        with pytest.raises(BadRequest, match="larger than") as refused:
            asyncio.run(body_of(headers, arriving()))
        assert refused.value.status == 413 and len(read) == parts

    async def small() -> AsyncIterator[bytes]:
        yield b'{"a"'
        yield b": 1}"

    assert asyncio.run(body_of({"content-length": "8"}, small())) == b'{"a": 1}'


@pytest.mark.slow  # imports vLLM
def test_a_replica_whose_engine_is_dead_answers_503_which_clients_try_again(student: Path) -> None:
    """The engine's end is faked."""
    from starlette.requests import Request
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.engine.exceptions import EngineDeadError

    from lorapar_ray.serving.replica import Replica

    async def dead(wanted: Any, request: Request) -> Any:
        assert wanted.stop_token_ids
        raise EngineDeadError

    replica = object.__new__(Replica)
    replica._key, replica._threshold, replica._encoder = None, None, load_encoder(str(student), None)

    def answered(body: bytes) -> tuple[int, str]:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        answer = asyncio.run(replica._answer(request, CompletionRequest, dead))
        return answer.status_code, json.loads(bytes(answer.body))["error"]["type"]

    assert answered(b'{"prompt": "x"}') == (503, "server_error")
    assert answered(b"{") == (400, "invalid_request_error")


def test_the_requests_that_a_server_takes_at_once_and_lets_wait(tmp_path: Path) -> None:
    settings = config(evaluate={"engine": {"max_num_seqs": 16}})
    deployment = _server(settings, RunDirectory(tmp_path), {}, 3, None)._bound_deployment
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (2 * 16, 8 * 16)
    assert deployment.num_replicas == 3


@pytest.mark.slow  # imports vLLM
def test_limits_bind_in_every_form_that_the_engine_takes_for_a_number_and_no_client_overtakes() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    kinds: list[tuple[Any, dict[str, Any]]] = [
        (CompletionRequest, {"prompt": "x"}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}]}),
    ]
    for kind, asked in kinds:
        for n in (9, "16384", 16384.0):
            with pytest.raises(BadRequest, match="n: at most 8") as refused:
                within_limits(kind.model_validate({**asked, "n": n}))
            assert refused.value.status == 400
        with pytest.raises(BadRequest, match="best_of: at most 8"):
            within_limits(kind.model_validate({**asked, "best_of": 99}))
        taken = within_limits(kind.model_validate({**asked, "n": "8", "priority": "-5"}))
        assert (taken.n, taken.priority) == (8, 0)


def test_a_long_prompt_of_token_ids_is_one_prompt() -> None:
    assert parsed(json.dumps({"prompt": [7] * 500}).encode()) == {"prompt": [7] * 500}


@pytest.mark.parametrize(
    ("asked", "question"),
    [
        ({"prompt": "What?"}, "What?"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "c"}]}, "c"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            "a b",
        ),
    ],
)
def test_auto_goes_by_the_last_question(asked: dict[str, Any], question: str) -> None:
    assert question_in(asked) == question


@pytest.mark.parametrize(
    "asked", [{}, {"messages": []}, {"messages": "x"}, {"messages": [5]}, {"prompt": [1, 2]}, {"prompt": " "}]
)
def test_auto_without_a_question(asked: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="give one prompt"):
        question_in(asked)


def test_the_key_is_compared_and_not_kept() -> None:
    digest = digest_of("s3cret")
    assert "s3cret" not in digest
    require_key({"authorization": "Bearer s3cret"}, digest)
    require_key({}, None)
    for headers in (
        {},
        {"authorization": "Bearer other"},
        {"authorization": "Bearer s3cret\u00e9"},
        {"authorization": digest},
    ):
        with pytest.raises(BadRequest) as refused:
            require_key(headers, digest)
        assert refused.value.status == 401


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Files of a base model like Qwen2.5's: its documents end with one token, and the turns of its template with
    another. Its plain text begins with a token of its own."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("package:smollm2-135m-instruct"))
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|endoftext|>"
    begin = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[begin])
    tokenizer.save_pretrained(tmp_path / "student")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=2, num_hidden_layers=1, **ends
    ).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_the_run_s_system_prompt_is_added_where_the_client_has_none(student: Path) -> None:
    mine, theirs = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
    encoder = load_encoder(str(student), "")
    assert with_training_prompt({"messages": [mine]}, encoder) == {
        "messages": [{"role": "system", "content": ""}, mine]
    }
    assert with_training_prompt({"messages": [theirs, mine]}, encoder) == {"messages": [theirs, mine]}
    assert with_training_prompt({"messages": [mine]}, load_encoder(str(student), None)) == {"messages": [mine]}
    assert with_training_prompt({"prompt": "p"}, encoder) == {"prompt": "p"}


@pytest.mark.slow  # imports vLLM
@pytest.mark.parametrize("template", [True, False])
def test_a_chat_gets_the_prompt_and_the_ends_of_training(student: Path, template: bool) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.renderers.registry import renderer_from_config

    if not template:
        (student / "chat_template.jinja").unlink()
    encoder = load_encoder(str(student), "Answer with a number.")
    assert (encoder.tokenizer.chat_template is None) is not template
    settings = EngineArgs(model=str(student), max_model_len=64).create_engine_config()
    plain = None if template else PLAIN
    renderer = OnlineRenderer(
        settings.model_config,
        renderer_from_config(settings),
        request_logger=None,
        chat_template=plain,
        chat_template_content_format="auto",
    )
    asked = {"model": "sft", "messages": [{"role": "user", "content": "What is 4 + 5?"}], "stop_token_ids": [7]}
    wanted = ending_as_trained(
        ChatCompletionRequest.model_validate(with_training_prompt(asked, encoder)), encoder.end_ids
    )
    _, [prompt] = asyncio.run(renderer.render_chat(wanted))
    assert prompt["prompt_token_ids"] == encoder.prompt_ids("What is 4 + 5?")
    assert encoder.tokenizer.decode(prompt["prompt_token_ids"]).startswith("<|im_start|>")
    ends = encoder.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert wanted.to_sampling_params(8, {}).stop_token_ids == [7, *(ends if template else ends[1:])]
    endless = ending_as_trained(ChatCompletionRequest.model_validate({**asked, "ignore_eos": True}), encoder.end_ids)
    assert endless.to_sampling_params(8, {}).stop_token_ids == [7]


def test_other_machines_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    assert (
        server_key(Address()) is None
        and server_key(Address("::1")) is None
        and server_key(Address("localhost")) is None
    )
    for host in ("0.0.0.0", "::", "10.1.2.3", "node7"):
        with pytest.raises(UserError, match=f"set a key in {KEY}"):
            server_key(Address(host))
    monkeypatch.setenv(KEY, "k")
    assert server_key(Address("0.0.0.0")) == "k"


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot listen there"):
            require_free(Address(port=port))
    require_free(Address(port=port))


def test_the_threshold_s_questions_are_labelled_ones_and_the_same_each_time(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.labels.mkdir()
    rows = [{"prompt": f"q{number}", "system": 1 + number % 2} for number in range(300)]
    for part in (0, 1):
        pq.write_table(pa.Table.from_pylist(rows[150 * part :][:150]), run.labels / f"part-0000{part}.parquet")
    adapters = {"sft": tmp_path, "grpo": tmp_path}
    found = labelled_questions(config(), run, adapters)
    assert {system: len(set(own)) for system, own in found.items()} == {1: 64, 2: 64}
    own = {system: [row["prompt"] for row in rows if row["system"] == system] for system in (1, 2)}
    assert found == {system: Random(config().seed).sample(own[system], 64) for system in (1, 2)}
    assert labelled_questions(config(), run, {"sft": tmp_path}) == {}
    entry = {"status": "started", "inputs": {"settings": {}, "sources": {}, "files": {}}}
    write_json(run.manifest_path, {"format": 2, "identity": {}, "stages": {"label": entry}})
    assert labelled_questions(config(), run, adapters) == {}  # other labels are being made


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", "--run-dir", str(tmp_path)])
    assert "holds no run" in str(done.exception)
    with pytest.raises(UserError, match="serves LoRA"):
        finished_adapters(
            config(adapter={"method": "ia3"}, order=["sft"], sft={"masked": False}), RunDirectory(tmp_path)
        )
