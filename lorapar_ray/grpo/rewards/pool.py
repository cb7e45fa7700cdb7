"""Rewards in processes of their own: one that raises, hangs or eats memory costs its sample only, never the run."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lorapar_ray.errors import UserError

START_LIMIT_S = 300.0
"""A fresh process imports the rewards' modules before it says it is ready; that is not a reward's own time."""


@dataclass(frozen=True)
class RewardSpec:
    """A reward's name (see `get_reward`) and its weight in the total."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of a batch of completions."""

    total: list[float]
    """Weighted sum of the parts; a failed part counts 0."""
    parts: dict[str, list[float | None]]
    """By reward; None where it failed."""
    failures: dict[str, int]
    """Samples lost by cause: `raised`, `timeout`, `crashed`, `not_finite`, and the name of a reward found elsewhere."""


def with_part(
    scored: RewardBatch, name: str, weight: float, values: list[float | None], order: list[str]
) -> RewardBatch:
    """A batch with one more reward, found elsewhere; parts are put into `order`."""
    failed = sum(value is None for value in values)
    return RewardBatch(
        [total + weight * (value or 0.0) for total, value in zip(scored.total, values, strict=True)],
        {each: {**scored.parts, name: values}[each] for each in order},
        scored.failures | ({name: failed} if failed else {}),
    )


class RewardPool:
    """Scores batches in a long-lived process that is replaced whenever a reward breaks it."""

    def __init__(self, specs: list[RewardSpec], *, time_limit_s: float, memory_limit_mb: int) -> None:
        """`time_limit_s` is what one call may take; a batch that takes longer is halved, a sample that does is lost."""
        self._specs = specs
        self._time_limit_s = time_limit_s
        self._memory_limit_mb = memory_limit_mb
        self._process: subprocess.Popen[str] | None = None
        self._asked = 0

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> RewardBatch:
        """Every reward of every completion; `columns` are the rows' further fields, as TRL passes them.

        Raises:
            UserError: there is no such reward, or it cannot be imported here.
        """
        failures: Counter[str] = Counter()
        parts = {spec.name: self._part(spec.name, prompts, completions, columns, failures) for spec in self._specs}
        total = [
            sum(spec.weight * (parts[spec.name][index] or 0.0) for spec in self._specs)
            for index in range(len(completions))
        ]
        return RewardBatch(total, parts, dict(failures))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with whatever the rewards have started
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None

    def _part(
        self,
        name: str,
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list[Any]],
        failures: Counter[str],
    ) -> list[float | None]:
        """One reward on a batch; if the batch fails it is halved until the samples at fault stand alone."""
        request = {"reward": name, "prompts": prompts, "completions": completions, "columns": columns}
        values, cause = self._ask(request, len(completions))
        if values is not None:
            if None in values:
                failures["not_finite"] += values.count(None)
            return values
        if len(completions) == 1:
            failures[cause] += 1
            return [None]
        middle = len(completions) // 2
        halves = []
        for part in (slice(None, middle), slice(middle, None)):
            fields = {key: value[part] for key, value in columns.items()}
            halves += self._part(name, prompts[part], completions[part], fields, failures)
        return halves

    def _ask(self, request: dict[str, Any], count: int) -> tuple[list[float | None] | None, str]:
        """(values, "") or (None, cause)."""
        self._asked += 1
        request = {"number": self._asked, **request}
        try:
            process = self._ready()
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = _read_line(process, self._time_limit_s)
        except BrokenPipeError:
            line = ""
        except TimeoutError:
            self.close()
            return None, "timeout"
        if not line:
            self.close()
            return None, "crashed"
        answer = json.loads(line)
        if answer["number"] != self._asked:
            self.close()  # an answer to something else
            return None, "crashed"
        values = answer.get("values")
        if values is None or len(values) != count:
            return None, "raised"
        return values, ""

    def _ready(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            names = [spec.name for spec in self._specs]
            command = [sys.executable, "-m", "lorapar_ray.grpo.rewards.worker", str(self._memory_limit_mb), *names]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            said = _read_line(self._process, START_LIMIT_S)
            if said and json.loads(said) != "ready":
                self.close()
                raise UserError(json.loads(said)["error"])
        return self._process


def _read_line(process: subprocess.Popen[str], limit: float) -> str:
    """The next line of the process's output, or "" when it ended; TimeoutError after `limit` seconds."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        deadline = time.monotonic() + limit
        if not selector.select(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
    return process.stdout.readline()
