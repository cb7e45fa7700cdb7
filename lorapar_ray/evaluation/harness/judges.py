"""Filters and the metric of our own task files: verdicts on answers, computed outside this process.

A filter gets all answers of a task at once. So programs run in parallel in the sandbox, and numbers are read in the
reward process, which has limits: a number of ten thousand digits makes one answer wrong and does not stop the
evaluation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorapar_ray.config import SandboxConfig
from lorapar_ray.evaluation.judging import judge, judging_process
from lorapar_ray.evaluation.statistics import pass_at_k

Verdicts = list[list[float]]
"""By question and sample: 1 right, 0 wrong."""

_sandbox = SandboxConfig()
_k = 1


@contextmanager
def judged_by(sandbox: SandboxConfig, k: int = 1) -> Iterator[None]:
    """Set the sandbox of programs, and the k of pass@k, inside this block."""
    global _sandbox, _k
    before = _sandbox, _k
    _sandbox, _k = sandbox, k
    try:
        yield
    finally:
        _sandbox, _k = before


def right(references: Sequence[Any], predictions: Sequence[Sequence[float]], **_: Any) -> float:
    """Unbiased pass@k of one question from the verdicts on its samples; with one sample whether it is right.

    Raises:
        UserError: there are fewer than k samples.
    """
    [verdicts] = predictions
    return pass_at_k(len(verdicts), int(sum(verdicts)), _k)


def numeric(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> Verdicts:
    """Whether the final number of an answer equals the reference."""
    flat = [
        ({"prompt": doc["question"], "answer": doc["answer"]}, text)
        for texts, doc in _pairs(resps, docs)
        for text in texts
    ]
    with judging_process("numeric") as process:
        verdicts, _ = judge(process, [row for row, _ in flat], [text for _, text in flat])
    return _grouped(verdicts, resps)


def humaneval(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> Verdicts:
    """Whether the function passes its tests."""
    from lorapar_ray.sandbox.tasks import humaneval_job

    return _programs([humaneval_job(doc, text) for texts, doc in _pairs(resps, docs) for text in texts], resps)


def mbpp(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> Verdicts:
    """Whether the program passes its tests."""
    from lorapar_ray.sandbox.tasks import mbpp_job

    return _programs([mbpp_job(doc, text) for texts, doc in _pairs(resps, docs) for text in texts], resps)


def mbpp_shots() -> list[dict[str, Any]]:
    """The three examples of MBPP's prompt, read from the file of lm-eval's own task.

    Importing that file would fetch `code_eval` from the hub, to run programs in this process.
    """
    import lm_eval.tasks

    source = Path(lm_eval.tasks.__file__).parent / "mbpp" / "utils.py"
    functions = [
        node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    [body] = [node.body for node in functions if node.name == "list_fewshot_samples"]
    [returned] = [node.value for node in body if isinstance(node, ast.Return) and node.value is not None]
    shots: list[dict[str, Any]] = ast.literal_eval(returned)
    return shots


def word_problems(docs: Any) -> Any:
    """The hub's SVAMP, converted to the prompt's columns; local files already have them."""
    from lorapar_ray.evaluation.harness.local_data import FAMILIES

    if {"question", "answer"} <= set(docs.column_names):
        return docs
    return docs.map(lambda doc: FAMILIES["svamp"](doc)[0], remove_columns=docs.column_names)


def _programs(jobs: Sequence[Any], resps: Sequence[Sequence[str]]) -> Verdicts:
    from lorapar_ray.sandbox import Limits, Sandbox

    limits = Limits(seconds=_sandbox.time_limit_s, memory_mb=_sandbox.memory_mb)
    with Sandbox(_sandbox.layer, limits, _sandbox.workers) as sandbox:
        return _grouped([verdict.passed for verdict in sandbox.run(jobs)], resps)


def _pairs(
    resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Sequence[str], Mapping[str, Any]]]:
    return zip(resps, docs, strict=True)


def _grouped(verdicts: Sequence[bool], resps: Sequence[Sequence[str]]) -> Verdicts:
    left = iter(verdicts)
    return [[float(next(left)) for _ in texts] for texts in resps]
