"""The reward `code_tests`: the program in a completion, tested in the sandbox."""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import ceil
from typing import TYPE_CHECKING, Any

from lorapar_ray.boundary import boundary
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.rewards.functions import Completions, text_of
from lorapar_ray.text import one_line

if TYPE_CHECKING:
    from lorapar_ray.config import SandboxConfig
    from lorapar_ray.sandbox import Job, Sandbox

CODE_TESTS = "code_tests"
TESTS = "give a program of asserts, a list of such texts, or a row of HumanEval or MBPP"
SHARE = 0.6
"""Share of a call's time limit that its programs may use, so that no program breaks its reward process."""

_made: Callable[[], Sandbox] | None = None
_sandbox: Sandbox | None = None
_lock = threading.Lock()


def configure(settings: SandboxConfig) -> None:
    """Set how `code_tests` confines programs in this process; without it the defaults hold.

    Raises:
        UserError: this machine has no such layer.
    """
    from lorapar_ray.sandbox import Limits, Sandbox, choose

    global _made
    choose(settings.layer)
    limits = Limits(seconds=settings.time_limit_s, memory_mb=settings.memory_mb)
    _made = lambda: Sandbox(settings.layer, limits, settings.workers)  # noqa: E731


def call_limit_s(settings: SandboxConfig, programs: int, reward_time_limit_s: float) -> float:
    """Time limit of a call with this many programs: every program may use all of its own time, as in evaluation."""
    return max(reward_time_limit_s, ceil(programs / settings.workers) * settings.time_limit_s / SHARE)


def code_tests(prompts: list[str], completions: Completions, answer: list[str], **_: Any) -> list[float]:
    """1 if the program in the completion passes the row's tests, which are its answer (see `job_of`).

    Raises:
        UserError: an answer holds no tests, or this machine has no sandbox.
    """
    jobs = [job_of(text_of(done), tests) for done, tests in zip(completions, answer, strict=True)]
    return [float(verdict.passed) for verdict in _ready().run(jobs)]


def job_of(completion: str, answer: str) -> Job:
    """The job of one row, whose answer is one of:

    - a program of asserts: `assert add(2, 2) == 4`;
    - a list of such programs, as MBPP's `test_list`;
    - an object: a row of HumanEval {prompt, entry_point, test}, a row of MBPP {test_list, test_imports}, or
      {tests, setup}.

    Raises:
        UserError: the answer holds no tests.
    """
    with boundary(f"{CODE_TESTS}: an answer of the data is not a set of tests: {one_line(answer, 60)!r}", TESTS):
        return _job_of(completion, answer)


def _job_of(completion: str, answer: str) -> Job:
    from lorapar_ray.sandbox.tasks import code_of, humaneval_job, mbpp_job, tests_job

    given = _parsed(answer)
    if isinstance(given, list):
        return mbpp_job({"test_list": given}, completion)
    if isinstance(given, Mapping):
        if "test_list" in given:
            return mbpp_job(given, completion)
        if "tests" in given:
            return tests_job(code_of(completion), str(given["tests"]), str(given.get("setup", "")))
        return humaneval_job(given, completion)
    return tests_job(code_of(completion), answer)


def _parsed(answer: str) -> Any:
    """A list or an object, written as JSON or as Python prints it; else the text itself."""
    if not answer.lstrip().startswith(("[", "{")):
        return answer
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return read(answer)
    raise UserError(f"{CODE_TESTS}: an answer is neither JSON nor a program: {answer[:60]!r}")


def _ready() -> Sandbox:
    from lorapar_ray.sandbox import Sandbox

    global _sandbox
    with _lock:
        if _sandbox is None:
            _sandbox = Sandbox() if _made is None else _made()
        return _sandbox
