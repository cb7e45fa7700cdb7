"""Tasks of lm-eval for some models on the same engines; what is finished is kept, question by question.

<root>/rows/<model>/<task>.parquet     a row for each question, metric and filter (see `harness.results`)
<root>/tasks/<model>/<task>.json       shares with their intervals
<answers>/<model>/*.parquet            the model's answers by request; an interrupted run resumes from them
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapar_ray.config import EvaluateConfig
from lorapar_ray.datasets.chat import Encoder
from lorapar_ray.engines.requests import Answer, Request
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.answers import AnswerStore
from lorapar_ray.evaluation.engines import Engines
from lorapar_ray.evaluation.harness import require_lm_eval
from lorapar_ray.evaluation.serving import Served
from lorapar_ray.evaluation.task_files import file_name, result_file, rows_file, unfinished
from lorapar_ray.files import write_json
from lorapar_ray.progress import console, progress
from lorapar_ray.text import printable

if TYPE_CHECKING:
    from lorapar_ray.evaluation.harness.catalogue import Catalogue

SHOWN = 12
"""Most printed lines of a task's shares; MMLU has 57 subjects."""


def catalogue_of(settings: EvaluateConfig) -> Catalogue:
    """The catalogue, after checking the settings' tasks, so that a wrong name is found before an engine starts.

    Raises:
        UserError: lm-eval is not installed, a task or its data is not there, or nothing here can confine the programs
            that a task runs.
    """
    require_lm_eval("evaluate.tasks")
    from lorapar_ray.evaluation.harness.catalogue import SANDBOXED, Catalogue, wanted
    from lorapar_ray.sandbox import choose

    for first, second in combinations(settings.tasks, 2):
        if file_name(first) == file_name(second):
            raise UserError(
                f"evaluate.tasks: '{first}' and '{second}' would have the same file name; rename a task file"
            )
    catalogue = Catalogue(settings.data, settings.include)
    loaded = {name for text in settings.tasks for name in catalogue.load(wanted(text))["tasks"]}
    if loaded & SANDBOXED:
        choose(settings.sandbox.layer)
    return catalogue


def evaluate_tasks(
    settings: EvaluateConfig,
    catalogue: Catalogue,
    engines: Engines,
    models: Mapping[str, Path | None],
    encoder: Encoder,
    *,
    root: Path,
    answers: Path,
) -> None:
    """Write the results of each task for each model; finished ones are kept.

    Args:
        models: by name, the adapter (None: the base alone) on the base that `engines` serve.

    Raises:
        UserError: a task cannot be evaluated; what was answered is kept.
    """
    from lorapar_ray.evaluation.harness.catalogue import wanted
    from lorapar_ray.evaluation.harness.results import write_rows
    from lorapar_ray.evaluation.harness.run import evaluate_task

    for name, adapter in models.items():
        due = [task for _, task in unfinished(root, [name], settings.tasks)]
        if not due:
            continue
        served = Served(engines, adapter, AnswerStore(answers / name))
        for task in due:
            start = time.monotonic()
            rows, shares = evaluate_task(catalogue, wanted(task), settings, _shown(served, f"{name}: {task}"), encoder)
            write_rows(rows_file(root, name, task), rows)
            result = {"model": name, "task": task, "results": shares, "seconds": round(time.monotonic() - start, 2)}
            write_json(result_file(root, name, task), result)
            for line in lines(shares)[:SHOWN]:
                console.print(f"  {name}: {line}")


def lines(shares: Sequence[Mapping[str, Any]]) -> list[str]:
    """The printed shares, groups first."""
    found = []
    for share in shares:
        low, high = share["interval"]
        what = f"{share['task']}, {share['metric']}" + (f" ({share['filter']})" if share["filter"] != "none" else "")
        found.append(printable(f"{what}: {share['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {share['n']}"))
    return found


def _shown(served: Served, what: str) -> Callable[[Sequence[Request]], list[Answer]]:
    """Answers under a progress bar."""

    def ask(requests: Sequence[Request]) -> list[Answer]:
        done = 0

        def count(n: int) -> None:
            nonlocal done
            done = n

        with progress(what, len(requests), lambda: (done, "")):
            return served.answers(requests, count)

    return ask
