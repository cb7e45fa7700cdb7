"""`lorapar serve` on a finished run, by the real `openai` client: four models, 16 clients at once, a killed replica."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AuthenticationError, BadRequestError, NotFoundError, OpenAI

from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.ports import free_port
from tests.processes import below
from tests.tiny_run import ROOT, command

pytestmark = pytest.mark.e2e
SECRET = "not-for-everyone"
ASKED: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}


Server = tuple[subprocess.Popen[str], str]
"""The running command, and its address."""


@contextmanager
def serving(
    run: Path, port: int, log: Path, environment: Mapping[str, str] | None = None, around: Sequence[str] = ()
) -> Iterator[Server]:
    """The command on this port, once it serves; it ends with the block. Its standard error goes to `log`.

    Args:
        environment: further variables of it.
        around: begins its command line.
    """
    own = {**os.environ, "LORAPAR_API_KEY": SECRET}
    own.pop("RAY_ADDRESS", None)
    started = [*around, *command("serve", "--run-dir", run, "--port", str(port))]
    with log.open("a") as errors:
        process = subprocess.Popen(
            started, cwd=ROOT, env=own | dict(environment or {}), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        assert said.startswith("serving base, sft, grpo, auto at http://127.0.0.1:"), said + log.read_text()
        yield process, said.split()[-1]
    finally:
        process.kill()
        process.wait(60)


@pytest.fixture(scope="module")
def server(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "stderr"
    with serving(finished.run, free_port(), log) as (process, address):
        assert process.stdout is not None
        told = process.stdout.readline()
        assert re.fullmatch(r"auto: the student's own vote agrees with the labels on \d+% \(chance 50 %\)\n", told)
        yield process, address
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert SECRET not in log.read_text() + process.stdout.read()


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server[1], api_key=SECRET, max_retries=0)


def ask(client: OpenAI, model: str, question: str) -> tuple[str, str, str | None]:
    """(the model that answered, its answer, the System that `auto` chose)"""
    message: list[Any] = [{"role": "user", "content": question}]
    raw = client.chat.completions.with_raw_response.create(model=model, messages=message, **ASKED)
    answer = raw.parse()
    return answer.model, answer.choices[0].message.content or "", raw.headers.get("x-lorapar-system")


def test_every_model_answers_and_auto_is_one_of_the_stages(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "sft", "grpo", "auto"]
    questions = [f"State the final answer: {number} + 1 =" for number in range(6)]
    answers = {model: [ask(client, model, each)[1] for each in questions] for model in ("base", "sft", "grpo")}
    assert len(set(map(tuple, answers.values()))) == 3
    for place, question in enumerate(questions):
        stage, said, system = ask(client, "auto", question)
        assert stage == {"1": "sft", "2": "grpo"}[system or ""] and said == answers[stage][place]


def test_a_stream_says_the_same(client: OpenAI) -> None:
    message: list[Any] = [{"role": "user", "content": "2 + 2 ="}]
    parts = client.chat.completions.create(model="grpo", messages=message, stream=True, **ASKED)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == ask(client, "grpo", "2 + 2 =")[1]


def test_refusals(client: OpenAI, server: Server) -> None:
    with pytest.raises(AuthenticationError):
        list(OpenAI(base_url=server[1], api_key="other", max_retries=0).models.list())
    with pytest.raises(NotFoundError, match="`nobody` does not exist"):
        ask(client, "nobody", "x")
    with pytest.raises(BadRequestError, match="maximum context length"):
        ask(client, "base", "x " * 5000)
    with pytest.raises(BadRequestError, match="model 'auto': the question is too long"):
        ask(client, "auto", "x " * 5000)
    with pytest.raises(BadRequestError, match="n: at most 8"):
        client.post("/completions", body={"model": "base", "prompt": "x", "n": "16384"}, cast_to=object)
    with pytest.raises(APIStatusError, match="larger than") as refused:
        client.post("/completions", body={"model": "base", "prompt": "x" * 2**20}, cast_to=object)
    assert refused.value.status_code == 413
    parts = (b" " * 2**18 for _ in range(8))  # their sum is not declared
    headers = {"Authorization": f"Bearer {SECRET}"}
    assert httpx.post(f"{server[1]}/completions", content=parts, headers=headers, timeout=60).status_code == 413
    with pytest.raises(NotFoundError):  # vLLM's own server would take another adapter here
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "/"}, cast_to=object)


@pytest.mark.fault("serve", "Serve replica")
def test_sixteen_clients_at_once_and_a_killed_replica(client: OpenAI, server: Server, recovery: Recovery) -> None:
    models = ("base", "sft", "grpo", "auto")

    def answered(number: int, by: OpenAI = client) -> tuple[str, str, str | None]:
        return ask(by, models[number % 4], f"{number % 8} + 5 =")

    alone = [answered(number) for number in range(8)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(answered, range(48)))
    assert together == alone * 6
    [replica] = below("ServeReplica", server[0].pid)
    replica.kill()
    patient = client.with_options(max_retries=8, timeout=120)
    with recovery("serve", "Serve replica"):
        assert [answered(number, patient) for number in range(8)] == alone
