"""A submitted job's log is shown once and to its end, whatever happens to the connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from lorapar_ray import job_log
from lorapar_ray.errors import UserError
from lorapar_ray.job_log import JobLog
from lorapar_ray.submission import Jobs

CUT = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
LOG = "label\n  label 1/4\nlorapar: no space left\n"


def test_a_log_is_shown_in_whole_lines_however_it_comes_and_its_cause_is_found() -> None:
    whole = ["sft", "  sft 1/4", "lorapar: no space left", "(raylet) a\u2028b", "lorapar: done for"]
    text = "\n".join([*whole[:2], "    [state-dump] GcsServer - 2 total", *whole[2:]])
    for size in (1, 7, len(text)):
        shown: list[str] = []
        log = JobLog(shown.append)
        for start in range(0, len(text), size):
            log.add(text[start : start + size])
        assert log.cause == "no space left"
        log.end()
        assert shown == whole and log.cause == "done for"


def test_a_head_whose_python_lacks_the_package_is_told() -> None:
    log = JobLog(lambda _: None)
    log.add("/usr/bin/python: Error while finding module specification for 'lorapar_ray.cli' ")
    log.add("(ModuleNotFoundError: No module named 'lorapar_ray')\n")
    assert log.cause.startswith("the `python` there has no lorapar_ray; install it")


class Breaking:
    """Fault injection: a job server whose connections end early, and whose answers fail.

    Each attempt gets one of `tails`: how much of the log it sends, and the error that ends it (None: it is closed); and
    one of `answers`: a status, or an error. The last of each stays.
    """

    message, code = "Ray's own words", None
    """How Ray explains the end of the job, and its command's exit status."""

    def __init__(self, tails: list[tuple[int, Exception | None]], answers: list[str | Exception]) -> None:
        self.tails, self.answers, self.attempts = tails, answers, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.attempts += 1
        length, error = self.tails.pop(0) if len(self.tails) > 1 else self.tails[0]
        for start in range(0, length, 7):
            yield LOG[start : min(start + 7, length)]
        if error:
            raise error

    def get_job_info(self, job: str) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(status=SimpleNamespace(value=answer), message=self.message, driver_exit_code=self.code)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "FIRST_WAIT_S", 0.0)


def wait(server: Breaking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Jobs, "_connect", lambda _: server)
    Jobs("http://127.0.0.1:8265").wait("job")


@pytest.mark.parametrize(
    ("tails", "answers"),
    [
        ([(9, CUT), (len(LOG), None)], ["RUNNING", "SUCCEEDED"]),
        ([(9, OSError("reset")), (3, CUT), (9, CUT), (len(LOG), None)], ["RUNNING", "RUNNING", "SUCCEEDED"]),
        ([(9, None), (len(LOG), None)], ["RUNNING", "SUCCEEDED"]),  # the head lost the node's agent
        ([(9, CUT), (len(LOG), None)], ["SUCCEEDED"]),  # the job ended meanwhile
        ([(len(LOG), None)], [ConnectionError("refused"), "SUCCEEDED"]),
    ],
)
def test_a_connection_that_breaks_is_made_again_and_no_line_comes_twice(
    tails: list[tuple[int, Exception | None]],
    answers: list[str | Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wait(Breaking(tails, answers), monkeypatch)
    assert capsys.readouterr().out == LOG


def test_the_cause_is_found_after_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"job: failed \(no space left\)"):
        wait(Breaking([(9, None), (len(LOG), None)], ["RUNNING", "FAILED"]), monkeypatch)


def test_a_connection_that_says_nothing_is_made_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import asyncio

    class Silent(Breaking):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            async for text in super().tail_job_logs(job):
                yield text
            if self.attempts == 1:
                await asyncio.Event().wait()

    monkeypatch.setattr(job_log, "QUIET_S", 0.05)
    wait(Silent([(9, None), (len(LOG), None)], ["RUNNING", "SUCCEEDED"]), monkeypatch)
    assert capsys.readouterr().out == LOG


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [("RUNNING", CUT, "close code 1006"), ("RUNNING", None, "it ended early"), (ConnectionError("gone"), CUT, "gone")],
)
def test_a_job_is_left_alone_after_many_failures(
    answer: str | Exception, error: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Breaking([(9, error)], [answer])
    with pytest.raises(UserError, match=rf"{said}.*; job keeps running; the same command follows it again"):
        wait(server, monkeypatch)
    assert server.attempts == job_log.TRIES + 1  # the first has shown something


def test_the_end_of_a_job_is_told_although_its_node_and_log_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"job: failed \(Ray's own words\)"):
        wait(Breaking([(9, CUT)], ["RUNNING", "FAILED"]), monkeypatch)


TRACEBACK = "Traceback (most recent call last):\n" + '  File "x.py", line 1, in y\n' * 20 + "KeyError: 'rows'\n"
AFTER = "Job entrypoint command failed with exit code 1"


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        (
            f"{AFTER}, last available logs (truncated to 20,000 chars):\n{TRACEBACK}\n",
            1,
            "exit status 1: KeyError: 'rows'",
        ),
        (f"{AFTER}. No logs available.", 1, f"{AFTER}. No logs available."),
        ("Job supervisor actor died:\nits node is lost", None, "Job supervisor actor died: its node is lost"),
    ],
)
def test_a_job_that_gives_no_reason_has_the_last_line_of_its_log(
    message: str, code: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Breaking([(9, CUT)], ["RUNNING", "FAILED"])
    server.message, server.code = message, code  # type: ignore[assignment]
    with pytest.raises(UserError) as ended:
        wait(server, monkeypatch)
    assert str(ended.value) == f"job: failed ({said}); the same command resumes"


def test_a_job_that_its_cluster_has_lost_does_not_keep_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("Request failed with status code 404: Job job does not exist.")
    server = Breaking([(9, CUT)], ["RUNNING", ConnectionError("refused"), lost])
    with pytest.raises(
        UserError, match=r"no longer knows job: its head has started again without its state, .* resumes"
    ):
        wait(server, monkeypatch)
    assert server.attempts == 3 and capsys.readouterr().out == "label\n  l\n"


def test_a_proxy_without_its_server_tells_nothing_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = RuntimeError("Request failed with status code 404: 404 page not found.")
    wait(Breaking([(9, CUT), (len(LOG), None)], [missing, "SUCCEEDED"]), monkeypatch)


def test_an_output_that_is_closed_is_no_broken_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    server = Breaking([(len(LOG), None)], ["SUCCEEDED"])
    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        wait(server, monkeypatch)
    assert server.attempts == 1
