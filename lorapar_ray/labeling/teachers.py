"""The teachers' interface: `await teacher.ask(prompt, choices)` returns the log-probability of each choice.

Three kinds: an engine hosted on Ray Serve (`hosted.py`), an OpenAI-compatible endpoint elsewhere (`remote.py`), and the
user's Python class, `module:Class`, created once per asking worker with the teacher's config:

    class MyTeacher:
        def __init__(self, teacher: TeacherConfig) -> None: ...
        async def ask(self, prompt: str, choices: list[str]) -> Asked: ...
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lorapar_ray.boundary import imported
from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.errors import UserError
from lorapar_ray.waiting import foreign


@dataclass(frozen=True)
class Asked:
    """A teacher's answer to one prompt."""

    log_probs: list[float]
    """Of each choice, in order; up to a common constant."""
    tokens: int
    """Tokens read and written."""
    latency_s: float
    """Measured from sending the request, without the wait for a rate limit."""


class Teacher(Protocol):
    """The interface of every kind of teacher."""

    async def ask(self, prompt: str, choices: list[str]) -> Asked:
        """Log-probabilities of the choices as the next token.

        Raises:
            Refused: the same request would fail again.
            Exception: any other error, which may be retried.
        """
        ...


class Refused(Exception):
    """A permanent failure for this question: the prompt is too long or refused."""


class ShutOut(Refused):
    """A permanent failure for all questions: a wrong key, an unknown model."""


T = TypeVar("T")


async def persist(
    ask: Callable[[], Awaitable[T]], label: LabelConfig, given_up: Callable[[], bool] = lambda: False
) -> T:
    """Ask with up to `label.retries` retries and growing backoff.

    Args:
        given_up: tells whether the teacher has been given up meanwhile, so that a retry is useless.

    Raises:
        Refused: at once.
        Exception: the last failure.
    """
    attempt = 0
    while True:
        try:
            return await foreign(ask())
        except Refused:
            raise
        except Exception:
            if attempt == label.retries:
                raise
            await asyncio.sleep(label.backoff_s * 2**attempt)
            if given_up():
                raise
        attempt += 1


class ServedTeacher:
    """Calls a teacher that this run hosts on Ray Serve."""

    def __init__(self, teacher: TeacherConfig, app: str, timeout_s: float) -> None:
        from ray import serve

        self._handle = serve.get_deployment_handle(teacher.engine_of or teacher.name, app)
        self._how = teacher.use_chat_template, teacher.thinking_tokens
        self._timeout_s = timeout_s

    async def ask(self, prompt: str, choices: list[str]) -> Asked:
        from ray.exceptions import RayTaskError

        start = time.monotonic()
        try:
            answer = self._handle.ask.remote(prompt, choices, *self._how)
            log_probs, tokens = await asyncio.wait_for(answer, self._timeout_s)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, ValueError | UserError):  # errors by which vLLM and this project refuse a prompt
                raise Refused(str(cause)) from error
            raise
        return Asked(log_probs, tokens, time.monotonic() - start)


def connect(
    label: LabelConfig, teacher: TeacherConfig, apps: Mapping[str, str], keys: Mapping[str, str]
) -> Teacher | None:
    """The teacher behind its config; None if it is hosted and did not start.

    Args:
        apps: Serve application of each hosted teacher that runs.
        keys: secret of each remote teacher that has one.
    """
    if teacher.kind == "remote":
        from lorapar_ray.labeling.remote import RemoteTeacher

        share = teacher.requests_per_second and teacher.requests_per_second / label.workers
        return RemoteTeacher(teacher, label.prompt.choice, label.timeout_s, share, keys.get(teacher.name))
    if teacher.kind == "python":
        made: Teacher = python_class(teacher)(teacher)
        return made
    return ServedTeacher(teacher, apps[teacher.name], label.timeout_s) if teacher.name in apps else None


def python_class(teacher: TeacherConfig) -> Any:
    """The class that `model: module:Class` names.

    Raises:
        UserError: there is none.
    """
    what = f"teacher '{teacher.name}': class '{teacher.model}'"
    return imported(teacher.model, what, "write it as module:Class, importable here")
