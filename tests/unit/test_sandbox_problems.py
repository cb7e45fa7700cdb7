"""HumanEval and MBPP: canonical solutions pass, changed ones fail.

One problem in 8; all of them with LORAPAR_ALL_PROBLEMS=1 in the environment.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.sandbox import Job, Limits, Sandbox
from lorapar_ray.sandbox.tasks import humaneval_job, mbpp_job

FOLDERS = [parent / "shared" / "data" for parent in Path(__file__).parents]
DATA = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
EVERY = 1 if os.environ.get("LORAPAR_ALL_PROBLEMS") else 8
CHANGE = """

def _changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return 3 * value + 1
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, (list, tuple)):
        return type(value)([*value, *value, 0])
    return "?" if value is None else None

def _wrapped(right):
    return lambda *args, **kwargs: _changed(right(*args, **kwargs))

"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(limits=Limits(seconds=30)) as made:
        yield made


def humaneval() -> list[dict[str, Any]]:
    path = DATA / "humaneval" / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip("no HumanEval here")
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines][::EVERY]


def mbpp() -> list[dict[str, Any]]:
    path = DATA / "mbpp" / "sanitized-mbpp.json"
    if not path.is_file():
        pytest.skip("no MBPP here")
    return [json.loads(line) for line in path.read_text().splitlines()][::EVERY]


def wrong(code: str, job: Job) -> str:
    """The program with one more line, so that the tested function returns something else."""
    return f"{code}{CHANGE}{job.names[0]} = _wrapped({job.names[0]})\n"


def test_humaneval(sandbox: Sandbox) -> None:
    rows = humaneval()
    right = [humaneval_job(row, row["canonical_solution"]) for row in rows]
    changed = [humaneval_job(row, wrong(row["canonical_solution"], job)) for row, job in zip(rows, right, strict=True)]
    check(sandbox, [row["task_id"] for row in rows], right, changed)


@pytest.mark.slow
def test_mbpp(sandbox: Sandbox) -> None:
    rows = mbpp()
    right = [mbpp_job(row, row["code"]) for row in rows]
    changed = [mbpp_job(row, wrong(row["code"], job)) for row, job in zip(rows, right, strict=True)]
    check(sandbox, [row["task_id"] for row in rows], right, changed)


def check(sandbox: Sandbox, ids: list[Any], right: list[Job], changed: list[Job]) -> None:
    verdicts = dict(zip(ids, sandbox.run(right), strict=True))
    assert {key: verdict for key, verdict in verdicts.items() if not verdict.passed} == {}
    verdicts = dict(zip(ids, sandbox.run(changed), strict=True))
    assert {key for key, verdict in verdicts.items() if verdict.passed} == set()
    assert "tests" not in {verdict.reason for verdict in verdicts.values()}
