"""The report: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import boundary
from lorapar_ray.config import Config
from lorapar_ray.evaluation.statistics import Paired, paired
from lorapar_ray.files import atomic_path
from lorapar_ray.reporting import charts, evaluation_page, partition_charts
from lorapar_ray.reporting.data import MODELS, RunData, read_run
from lorapar_ray.reporting.evaluation_page import read_run_found
from lorapar_ray.reporting.html import rendered
from lorapar_ray.result_stages import said, shortened
from lorapar_ray.runs import RunDirectory

SAMPLES_SHOWN = 24
SIGNIFICANT = 0.05
"""Below this p the page reports a gain or a loss."""
DAMAGED = "a file of the stages it shows is damaged or of another version: redo that stage"
OUT_OF_DATE = "out of date"
OVERVIEW = ("label_split", "scatter", "theta_qkvgud", "sft_loss", "reward", "accuracies")


def write_report(config: Config, run: RunDirectory) -> Path:
    """Write `index.html`, `evaluation.html`, `plots/*.svg` and `overview.png` in `report/`; returns the first's path.

    Sections of stages that have not run say so. Results that are out of date are named and marked; accuracies of them
    are left out of the page's summary.
    """
    data = read_run(config, run)
    with boundary("report: this run cannot be shown", DAMAGED):
        drawable = _drawable(data)
    figures = {}
    for name, draw in drawable.items():
        with boundary(f"report: plot '{name}' cannot be drawn", DAMAGED):
            figures[name] = charts.svg(draw, data)
    for name, text in figures.items():
        with atomic_path(run.report / "plots" / f"{name}.svg") as draft:
            draft.write_text(text, encoding="utf-8")
    panels = [drawable[name] for name in OVERVIEW if name in drawable]
    if panels:
        with atomic_path(run.report / "overview.png") as draft:
            charts.overview(draft, data, panels)  # of plots that could be drawn
    with boundary("report: the evaluation cannot be shown", DAMAGED):
        found, outdated = read_run_found(run), said(data.state.outdated)
        evaluation_page.write(run.report / "evaluation.html", f"Evaluation · {config.name}", found, outdated)
    page = run.report / "index.html"
    with boundary("report: the page cannot be written", DAMAGED), atomic_path(page) as draft:
        draft.write_text(render(config, data, figures), encoding="utf-8")
    return page


def render(config: Config, data: RunData, figures: dict[str, str]) -> str:
    """The page's HTML; everything but our own plots and style is escaped."""
    outdated = data.state.outdated
    versions: dict[str, str] = next((s["versions"] for s in reversed(data.stages.values()) if "versions" in s), {})
    return rendered(
        "page.html.j2",
        name=config.name,
        model=config.model.path,
        config=config,
        figures=figures,
        labels=data.labels,
        partition=data.partition,
        systems=data.systems,
        samples=_spread(data.samples),
        accuracy=[_result(name, result) for name, result in (in_order(config, data.accuracy) | data.accuracy).items()],
        verdicts=verdicts(in_order(config, data.accuracy), data.right),
        outdated={name: shortened(why) for name, why in outdated.items()},
        all_outdated=said(outdated),
        versions=versions,
    )


def in_order(config: Config, accuracy: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The base, then what training leaves, in order."""
    return {name: accuracy[name] for name in ("base", *config.trained) if name in accuracy}


def verdicts(accuracy: dict[str, dict[str, Any]], right: dict[str, dict[str, bool]]) -> list[str]:
    """One sentence about each step from one model to the next.

    Two models that answered the same questions are compared question by question; else only their intervals are.
    """
    said = []
    for before, after in pairwise(accuracy):
        change = 100 * (accuracy[after]["accuracy"] - accuracy[before]["accuracy"])
        names = f"{MODELS[before]} → {MODELS[after]}: {change:+.1f} points"
        first, second = right.get(before, {}), right.get(after, {})
        if first and first.keys() == second.keys():
            said.append(f"{names} {_paired(paired(list(first.values()), [second[key] for key in first]))}")
        else:
            said.append(f"{names}; {_apart(accuracy[before]['interval'], accuracy[after]['interval'])}")
    return said


def _paired(found: Paired) -> str:
    low, high = (100 * bound for bound in found.interval)
    shown = "no difference is shown at this n"
    if found.p < SIGNIFICANT:
        shown = f"this is a {'gain' if found.difference > 0 else 'loss'}"
    return (
        f"(95 % interval {low:+.1f} to {high:+.1f}): {found.gained} questions gained, {found.lost} lost, exact McNemar "
        f"p = {found.p:.2g}; {shown}."
    )


def _apart(old: list[float], new: list[float]) -> str:
    if new[0] > old[1]:
        return "the intervals lie apart, so this is a gain."
    if new[1] < old[0]:
        return "the intervals lie apart, so this is a loss."
    return "the intervals overlap, so no difference is shown at this n."


def _drawable(data: RunData) -> dict[str, charts.Draw]:
    """Every plot with data, by name; the title of a plot of results that are out of date says so."""
    return {
        name: _marked(draw) if stage in data.state.outdated else draw
        for stage, draws in _drawable_of(data)
        for name, draw in draws.items()
    }


def _marked(draw: charts.Draw) -> charts.Draw:
    def drawn(axis: Any, run: RunData) -> None:
        draw(axis, run)
        axis.set_title(f"{axis.get_title('left')} · {OUT_OF_DATE}", loc="left")

    return drawn


def _drawable_of(data: RunData) -> Iterator[tuple[str, dict[str, charts.Draw]]]:
    """Plots by name, and the stage whose results they show."""
    if data.accuracy:
        yield "evaluate", {"accuracies": charts.accuracies}
    if any("seconds" in stage for name, stage in data.stages.items() if name != "report"):
        yield "", {"seconds": charts.seconds}
    if data.labels:
        yield "label", {"label_split": charts.label_split, "tasks": charts.tasks}
        if data.labels["votes"]:
            yield "label", {"confidence": charts.confidence}
    if data.scatter:
        yield "partition", {"scatter": partition_charts.scatter}
    if data.partition:
        yield "partition", {"layers": partition_charts.layers, "modules": partition_charts.modules}
        systems = ("system1", "system2")
        yield "partition", {f"heat_{name}": partial(partition_charts.heat, system=name) for name in systems}
        curves = data.partition.get("curves", {})
        subsets = [subset for subset in partition_charts.PAPER_KEPT if subset in curves]
        yield "partition", {f"theta_{subset}": partial(partition_charts.theta, subset=subset) for subset in subsets}
        if curves:
            yield "partition", {"overlap": partition_charts.overlap}
        if data.partition["control"]:
            yield "partition", {"signal": partition_charts.signal}
    if data.sft:
        yield "sft", {"sft_loss": charts.sft_loss}
    if data.grpo:
        grpo = (charts.reward, charts.length, charts.ratio, charts.gaps, charts.phases, charts.idle)
        yield "grpo", {draw.__name__: draw for draw in grpo}


def _result(name: str, result: dict[str, Any]) -> dict[str, Any]:
    lines = [_line("all", result), *(_line(task, entry) for task, entry in result["by_task"].items())]
    return {"label": MODELS[name], **lines[0], "lines": lines}


def _line(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    low, high = entry["interval"]
    shares = {"share": f"{entry['accuracy']:.1%}", "interval": f"{low:.1%} – {high:.1%}"}
    return {"task": task, "n": entry["n"], "correct": entry["correct"], **shares}


def _spread(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A readable number of completions, evenly over the run."""
    step = max(1, len(samples) // SAMPLES_SHOWN)
    return samples[::step][:SAMPLES_SHOWN]
