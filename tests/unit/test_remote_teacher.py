"""A remote teacher with a real HTTP server that fails in many ways: only the failed answer is lost."""

import asyncio
import gzip
import json
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.errors import UserError
from lorapar_ray.labeling import remote, secrets
from lorapar_ray.labeling.panel import Failure, Panel, checked
from lorapar_ray.labeling.store import Answer, VoteStore
from lorapar_ray.labeling.summary import render
from lorapar_ray.labeling.teachers import Asked

KEY = "sk-very-secret-0123456789"
GOOD = {
    "choices": [{"logprobs": {"top_logprobs": [{" 1": -0.1, " 2": -2.5}]}}],
    "usage": {"total_tokens": 12},
}


class Endpoint(BaseHTTPRequestHandler):
    """Answers every POST with `answer`: (status, headers, body)."""

    answer: ClassVar[tuple[int, dict[str, str], bytes]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, body = self.answer
        body = body.replace(b"{authorization}", self.headers["Authorization"].encode())
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the client may have closed the connection
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def ask(url: str, status: int, body: bytes, **headers: str) -> list[Answer] | Failure:
    Endpoint.answer = (status, {name.replace("_", "-"): value for name, value in headers.items()}, body)
    teacher = {"name": "far", "kind": "remote", "model": "m", "base_url": url}
    label = LabelConfig.model_validate({"teachers": [teacher], "retries": 0, "timeout_s": 20})

    async def once() -> list[Answer] | Failure:
        return await Panel(label, {}, {"far": KEY}, "student").ask(label.teachers[0], "q", "1")

    return asyncio.run(once())


def body(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def test_an_honest_answer_is_a_vote_compressed_or_not(url: str) -> None:
    for found in (ask(url, 200, body()), ask(url, 200, gzip.compress(body()), Content_Encoding="gzip")):
        assert isinstance(found, list) and found[0].tokens == 12 and found[0].log_probs[0] > found[0].log_probs[1]


@pytest.mark.parametrize(
    ("answer", "headers", "why"),
    [
        (body(usage={"total_tokens": 10**30}), {}, "token count"),
        (body(usage={"total_tokens": -1}), {}, "token count"),
        (body(usage={"total_tokens": float("inf")}), {}, "infinity"),
        (b'{"usage": ' + b"9" * 5000 + b"}", {}, "digits"),
        (b"[" * 200_000, {}, "Recursion"),
        (lambda: gzip.compress(bytes(300 * 2**20)), {"Content_Encoding": "gzip"}, "inflates to more than"),
        (bytes(9 * 2**20), {}, "larger than"),
        (lambda: gzip.compress(body())[:-20], {"Content_Encoding": "gzip"}, "ends early"),
        (b"not gzip", {"Content_Encoding": "gzip"}, "is not gzip"),
        (b"x", {"Content_Encoding": "zstd"}, "not asked for"),
        (b"{\xff\xff", {}, "decode"),
        (b"null", {}, "not a JSON object"),
        (body(choices=None), {}, "has no '0'"),
        (body(choices=[{"logprobs": {"top_logprobs": [{" 1": None}]}}]), {}, "TypeError"),
        (body(choices=[{"logprobs": {"top_logprobs": [{" 1": float("nan")}]}}]), {}, "not numbers"),
    ],
)
def test_an_absurd_answer_loses_only_itself(
    url: str, answer: bytes | Callable[[], bytes], headers: dict[str, str], why: str
) -> None:
    found = ask(url, 200, answer if isinstance(answer, bytes) else answer(), **headers)
    assert isinstance(found, Failure) and why in found.reason and len(found.reason) < 200


def test_an_endpoint_that_echoes_the_key_does_not_publish_it(url: str) -> None:
    found = ask(url, 401, b"wrong key " + b"x" * 90 + b"{authorization} [/INST]\x1b[2J")
    assert isinstance(found, Failure) and "sk-" not in found.reason and "***" in found.reason
    assert "\x1b" not in found.reason


def test_a_reply_with_a_wild_retry_after_is_a_failure_like_others(url: str) -> None:
    for wish in ("9" * 400, "²", "-5", "Wed, 21 Oct 2015 07:28:00 GMT"):
        found = ask(url, 429, b"", Retry_After=wish.encode().decode("latin-1"))
        assert isinstance(found, Failure) and found.reason == "ConnectionError: status 429"


def test_a_request_that_is_cancelled_while_it_waits_takes_no_turn(url: str) -> None:
    Endpoint.answer = (200, {}, body())
    config = TeacherConfig.model_validate({"name": "far", "kind": "remote", "model": "m", "base_url": url})

    async def last() -> Asked:
        teacher = remote.RemoteTeacher(config, "System:", 20.0, 5.0, KEY)
        await teacher.ask("q", ["1", "2"])
        waiting = [asyncio.create_task(teacher.ask("q", ["1", "2"])) for _ in range(1000)]
        await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return await teacher.ask("q", ["1", "2"])  # behind the turns of the others it would wait for 200 s

    assert asyncio.run(asyncio.wait_for(last(), 60)).tokens == 12


def test_a_key_is_stripped_and_a_broken_one_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = TeacherConfig.model_validate(
        {"name": "far", "kind": "remote", "model": "m", "base_url": "http://h", "api_key_env": "FAR_KEY"}
    )
    monkeypatch.setenv("FAR_KEY", f" {KEY}\r\n")
    assert secrets.secret(teacher) == KEY
    for broken in (f"{KEY}\r\nX-Evil: 1", f"{KEY} {KEY}", "schlüssel-0123"):
        monkeypatch.setenv("FAR_KEY", broken)
        with pytest.raises(UserError, match="FAR_KEY holds spaces or control characters") as refused:
            secrets.secret(teacher)
        assert broken not in str(refused.value) and KEY not in str(refused.value)
    with pytest.raises(UserError) as misplaced:
        secrets.secret(teacher.model_copy(update={"api_key_env": KEY}))
    assert KEY not in str(misplaced.value)


@pytest.mark.parametrize(
    ("base_url", "keys", "warned"),
    [
        ("http://far.example/v1", {"far": KEY}, True),
        ("http://u:passwd@far.example/v1", {}, True),
        ("http://far.example/v1", {}, False),
        ("https://far.example/v1", {"far": KEY}, False),
        ("http://127.0.0.1:8000/v1", {"far": KEY}, False),
        ("http://127.evil.example/v1", {"far": KEY}, True),
    ],
)
def test_a_key_over_plain_http_is_warned_of(
    base_url: str, keys: dict[str, str], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = TeacherConfig.model_validate({"name": "far", "kind": "remote", "model": "m", "base_url": base_url})
    secrets.warn_of_plain_http([teacher], keys)
    assert ("plain http" in capsys.readouterr().out) is warned


@pytest.mark.parametrize(
    "address", ["ftp://h/v1", "http://[::1", "http://", "far/v1", "http://h:99999/v1", "http://u:x@1:2:3/v1"]
)
def test_an_invalid_address_is_one_line_before_anything_starts(address: str) -> None:
    with pytest.raises(ValidationError, match="base_url: write it as"):
        TeacherConfig.model_validate({"name": "far", "kind": "remote", "model": "m", "base_url": address})


def test_only_its_owner_can_read_a_new_vote_store(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.sqlite")
    store.add([(b"q", b"t", Answer([-0.1, -2.3], 3, 0.1))])
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize(
    "asked",
    [Asked([-0.1], 1, 0.1), Asked([-0.1, -2.0], 2**80, 0.1), Asked([-0.1, -2.0], 1, float("nan"))],
)
def test_a_python_teacher_is_held_to_the_same_limits(asked: Asked) -> None:
    with pytest.raises(ValueError):
        checked(asked, 2)


def test_an_inflated_body_is_never_held_whole() -> None:
    with pytest.raises(ValueError, match="inflates"):
        remote.inflated(gzip.compress(bytes(remote.MOST_BYTES + 1)), "gzip")
    assert remote.inflated(gzip.compress(b"x" * 100), "GZIP") == b"x" * 100


def test_a_warning_that_quotes_a_template_is_no_markup() -> None:
    teacher = {"split": {"1": 1}, "abstained": 0, "bias": None, "latency": {}, "not_asked": 0}
    summary = {
        "split": {"1": 1},
        "teachers": {"a": teacher},
        "fleiss_kappa": None,
        "votes_asked": 0,
        "votes_from_cache": 0,
        "votes_per_second": None,
        "rejected": 0,
        "warnings": ["teacher a was given up: near [/INST] in the template"],
    }
    assert "near \\[/INST] in" in render(summary)
