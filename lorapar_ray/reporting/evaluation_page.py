"""The page of an evaluation: shares with their intervals, models compared question by question, failures to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import parquet_batches, read_object
from lorapar_ray.datasets.rows import ROWS_PER_WRITE, read_columns
from lorapar_ray.evaluation.decisions import Decision, decisions
from lorapar_ray.evaluation.statistics import paired
from lorapar_ray.files import atomic_path
from lorapar_ray.reporting.data import MODELS, of_tasks
from lorapar_ray.reporting.html import rendered
from lorapar_ray.runs import RunDirectory

FAILURES = 200
"""Wrong answers shown for each model and task, evenly spread."""
TEST_ROWS = "test rows"
LONGEST = 4000
"""Most characters of a shown text."""
NEXT_TO_NOTHING = ("none", "")


@dataclass(frozen=True)
class Answers(Iterable[dict[str, Any]]):
    """A model's answers, read from the disk again in each pass, a chunk at a time."""

    tasks: Sequence[tuple[str, Path]] = ()
    """Each task of lm-eval with its table."""
    test_rows: Path | None = None
    """The table of a run's test rows; it has no prompts."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        kind = {"metric": "right", "filter": "", "asked": TEST_ROWS, "extracted": ""}
        for row in () if self.test_rows is None else _rows(self.test_rows):
            yield row | kind | {"target": row["answer"]}
        for asked, file in self.tasks:
            for row in _rows(file):
                yield row | {"asked": asked}


@dataclass(frozen=True)
class Found:
    """One model's results in an evaluation's folder."""

    model: str
    shares: list[dict[str, Any]]
    rows: Iterable[dict[str, Any]]
    """Its answers; read several times."""
    questions: Path | None = None
    """The table with the prompts of test rows."""


def read_found(root: Path, models: Sequence[str]) -> list[Found]:
    """Each model's results in `root`, in this order (see `lorapar_ray.evaluation.tasks`)."""
    found = []
    for model in models:
        shares, tables = of_tasks(root, model)
        found.append(Found(model, shares, Answers(tables)))
    return found


def read_run_found(run: RunDirectory) -> list[Found]:
    """The same of a run's models, with their answers to its test rows."""
    found = []
    for model, name in MODELS.items():
        file = run.eval / f"{model}.json"
        shares, tables = of_tasks(run.eval, model)
        answers = Answers(tables)
        if file.is_file():
            result = read_object(file)
            kind = {"metric": "right", "filter": "", "asked": TEST_ROWS}
            shares = [{"task": task, **kind, **share} for task, share in _by_task(result).items()] + shares
            answers = Answers(tables, run.eval / f"{model}.parquet")
        if shares:
            found.append(Found(name, shares, answers, run.data / "test.parquet"))
    return found


def _by_task(result: Mapping[str, Any]) -> dict[str, Any]:
    whole = {name: result[name] for name in ("n", "correct", "accuracy", "interval")}
    return {TEST_ROWS: whole} | (result["by_task"] if len(result["by_task"]) > 1 else {})


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Nothing if there is no file."""
    for batch in parquet_batches(file, {}, ROWS_PER_WRITE) if file.is_file() else ():
        yield from batch


def write_page(root: Path, models: Sequence[str]) -> Path:
    """Write `index.html` of a folder of `lorapar evaluate --model`; returns its path."""
    return write(root / "index.html", "Evaluation", read_found(root, models))


def write(page: Path, title: str, found: Sequence[Found], outdated: str = "") -> Path:
    """Write the page: one self-contained file; model-written text is escaped.

    Args:
        outdated: stages of a run whose results are out of date, and why.
    """
    wrong = [wrong_answers(each) for each in found]
    html = rendered(
        "evaluation.html.j2",
        title=title,
        outdated=outdated,
        shares=[{"model": each.model} | _readable(share) for each in found for share in each.shares],
        comparisons=list(comparisons(found)),
        failures=[row for each, counts in zip(found, wrong, strict=True) for row in failures(each, counts)],
        models=[each.model for each in found],
        tasks=list(dict.fromkeys(asked for counts in wrong for asked in counts)),
    )
    with atomic_path(page) as draft:
        draft.write_text(html, encoding="utf-8")
    return page


def _readable(share: Mapping[str, Any]) -> dict[str, Any]:
    low, high = share["interval"]
    return {
        "asked": share["asked"],
        "task": share["task"],
        "metric": _metric(share["metric"], share["filter"]),
        "n": share["n"],
        "correct": share.get("correct", "–"),
        "accuracy": f"{share['accuracy']:.1%}",
        "interval": f"{low:.1%} – {high:.1%}",
    }


def _metric(metric: str, kind: str) -> str:
    return metric if kind in NEXT_TO_NOTHING else f"{metric}, {kind}"


def comparisons(found: Sequence[Found]) -> Iterator[dict[str, Any]]:
    """Each model against the first one, on the questions that both have answered: paired difference and McNemar's p."""
    if not found:
        return
    first, *others = found
    known = decisions(first.rows)
    for other in others:
        theirs = decisions(other.rows)
        for key in known:
            ids = [each for each in known[key] if each in theirs.get(key, {})]
            if not ids:
                continue
            result = paired([known[key][each] for each in ids], [theirs[key][each] for each in ids])
            low, high = result.interval
            yield {
                "first": first.model,
                "second": other.model,
                "asked": key[0],
                "metric": _metric(key[1], key[2]),
                "n": result.n,
                "gained": result.gained,
                "lost": result.lost,
                "difference": f"{100 * result.difference:+.1f}",
                "interval": f"{100 * low:+.1f} … {100 * high:+.1f}",
                "p": f"{result.p:.2g}",
            }


def wrong_answers(found: Found) -> Counter[str]:
    """Everything that a model was asked, with the number of wrong answers by the first metric of each."""
    wrong: Counter[str] = Counter()
    metrics: dict[str, Decision] = {}
    for row in found.rows:
        wrong[row["asked"]] += _is_failure(row, metrics)
    return wrong


def failures(found: Found, wrong: Mapping[str, int]) -> list[dict[str, Any]]:
    """Wrong answers of one model by its first metric on each task, some of each task, spread evenly.

    Args:
        wrong: see `wrong_answers`.
    """
    seen: Counter[str] = Counter()
    metrics: dict[str, Decision] = {}
    chosen: list[dict[str, Any]] = []
    for row in found.rows:
        asked = row["asked"]
        if _is_failure(row, metrics):
            if seen[asked] % max(1, -(-wrong[asked] // FAILURES)) == 0:
                chosen.append(row)
            seen[asked] += 1
    prompts = _prompts(found, {row["id"] for row in chosen if "prompt" not in row})
    fields = ("asked", "task", "id", "prompt", "completion", "extracted", "target")
    whole = (row if "prompt" in row else row | {"prompt": prompts.get(row["id"], "")} for row in chosen)
    return [{"model": found.model} | {name: _cut(row[name]) for name in fields} for row in whole]


def _is_failure(row: Mapping[str, Any], metrics: dict[str, Decision]) -> bool:
    """Whether a row is a wrong answer by its task's first metric, which `metrics` remembers."""
    decision = (row["asked"], row["metric"], row["filter"])
    return metrics.setdefault(row["asked"], decision) == decision and row["right"] is False


def _prompts(found: Found, ids: set[str]) -> dict[str, str]:
    """The prompts of some test rows."""
    if not ids or found.questions is None or not found.questions.is_file():
        return {}
    rows = read_columns(found.questions, {"id": str, "prompt": str})
    return {row["id"]: row["prompt"] for row in rows if row["id"] in ids}


def _cut(text: Any) -> str:
    """The end of a long text; for a prompt with examples this is the question."""
    whole = str(text)
    return whole if len(whole) <= LONGEST else "…" + whole[-LONGEST:]
