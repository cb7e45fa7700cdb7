"""The report: one HTML file with everything inside."""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from lorapar_ray.boundary import boundary
from lorapar_ray.config import Config
from lorapar_ray.reporting import charts, partition_charts
from lorapar_ray.reporting.data import MODELS, RunData, read_run
from lorapar_ray.runs import RunDirectory, atomic_path
from lorapar_ray.text import shown

SAMPLES_SHOWN = 24
DAMAGED = "a file of the stages it shows is damaged or of another version: redo that stage"
OVERVIEW = ("label_split", "scatter", "theta_qkvgud", "sft_loss", "reward", "accuracies")


def write_report(config: Config, run: RunDirectory) -> Path:
    """Write `report/index.html`, `report/plots/*.svg` and `report/overview.png`; returns the page's path.

    Sections of stages that have not run say so.
    """
    data = read_run(run)
    with boundary("report: this run cannot be shown", DAMAGED):
        drawable = _drawable(data)
    figures = {}
    for name, draw in drawable.items():
        with boundary(f"report: plot '{name}' cannot be drawn", DAMAGED):
            figures[name] = charts.svg(draw, data)
    for name, text in figures.items():
        with atomic_path(run.report / "plots" / f"{name}.svg") as draft:
            draft.write_text(text)
    panels = [drawable[name] for name in OVERVIEW if name in drawable]
    if panels:
        with atomic_path(run.report / "overview.png") as draft:
            charts.overview(draft, data, panels)  # of plots that could be drawn
    page = run.report / "index.html"
    with boundary("report: the page cannot be written", DAMAGED), atomic_path(page) as draft:
        draft.write_text(render(config, data, figures), encoding="utf-8")
    return page


def render(config: Config, data: RunData, figures: dict[str, str]) -> str:
    """The page's HTML; everything but our own plots and style is escaped."""
    template = files("lorapar_ray.reporting").joinpath("page.html.j2").read_text()
    style = files("lorapar_ray.reporting").joinpath("style.css").read_text()
    versions: dict[str, str] = next((s["versions"] for s in reversed(data.stages.values()) if "versions" in s), {})
    return (
        Environment(autoescape=True, finalize=_shown)
        .from_string(template)
        .render(
            name=config.name,
            model=config.model.path,
            config=config,
            css=style,
            figures=figures,
            labels=data.labels,
            partition=data.partition,
            samples=_spread(data.samples),
            accuracy=[_result(name, result) for name, result in data.accuracy.items()],
            verdicts=verdicts({n: data.accuracy[n] for n in ("base", *config.order) if n in data.accuracy}),
            versions=versions,
        )
    )


def _shown(value: Any) -> Any:
    """Foreign text without control characters; what the page marks as safe is our own."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def verdicts(accuracy: dict[str, dict[str, Any]]) -> list[str]:
    """What the intervals allow one to say about each step from one model to the next, a sentence each."""
    said = []
    for before, after in pairwise(accuracy):
        (low, high), (new_low, new_high) = accuracy[before]["interval"], accuracy[after]["interval"]
        change = 100 * (accuracy[after]["accuracy"] - accuracy[before]["accuracy"])
        names = f"{MODELS[before]} → {MODELS[after]}: {change:+.1f} points"
        if new_low > high:
            said.append(f"{names}; the intervals lie apart, so this is a gain.")
        elif new_high < low:
            said.append(f"{names}; the intervals lie apart, so this is a loss.")
        else:
            said.append(f"{names}; the intervals overlap, so no difference is shown at this n.")
    return said


def _drawable(data: RunData) -> dict[str, charts.Draw]:
    """Every plot there is data for, by name."""
    draws: dict[str, charts.Draw] = {}
    if data.accuracy:
        draws["accuracies"] = charts.accuracies
    if any("seconds" in stage for name, stage in data.stages.items() if name != "report"):
        draws["seconds"] = charts.seconds
    if data.labels:
        draws |= {"label_split": charts.label_split, "tasks": charts.tasks}
        if data.labels["votes"]:
            draws["confidence"] = charts.confidence
    if data.scatter:
        draws["scatter"] = partition_charts.scatter
    if data.partition:
        draws |= {"layers": partition_charts.layers, "modules": partition_charts.modules}
        draws |= {f"heat_{name}": partial(partition_charts.heat, system=name) for name in ("system1", "system2")}
        curves = data.partition.get("curves", {})
        subsets = [subset for subset in partition_charts.PAPER_KEPT if subset in curves]
        draws |= {f"theta_{subset}": partial(partition_charts.theta, subset=subset) for subset in subsets}
        if curves:
            draws["overlap"] = partition_charts.overlap
        if data.partition["control"]:
            draws["signal"] = partition_charts.signal
    if data.sft:
        draws["sft_loss"] = charts.sft_loss
    if data.grpo:
        grpo = (charts.reward, charts.length, charts.ratio, charts.gaps, charts.phases, charts.idle)
        draws |= {draw.__name__: draw for draw in grpo}
    return draws


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
