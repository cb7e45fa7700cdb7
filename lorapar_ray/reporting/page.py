"""The report: one HTML file with everything inside."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from lorapar_ray.config import Config
from lorapar_ray.reporting import charts
from lorapar_ray.reporting.data import MODELS, RunData, read_run
from lorapar_ray.runs import RunDirectory, atomic_path

SAMPLES_SHOWN = 24


def write_report(config: Config, run: RunDirectory) -> Path:
    """Write `report/index.html`, `report/plots/*.svg` and `report/overview.png`; returns the page's path.

    Sections of stages that have not run say so.
    """
    data = read_run(run)
    figures = {draw.__name__: charts.svg(draw, data) for draw in _drawable(data)}
    for name, text in figures.items():
        with atomic_path(run.report / "plots" / f"{name}.svg") as draft:
            draft.write_text(text)
    wanted = (charts.label_split, charts.scatter, charts.theta, charts.sft_loss, charts.reward, charts.accuracies)
    panels = [draw for draw in wanted if draw.__name__ in figures]
    if panels:
        with atomic_path(run.report / "overview.png") as draft:
            charts.overview(draft, data, panels)
    page = run.report / "index.html"
    with atomic_path(page) as draft:
        draft.write_text(render(config, data, figures))
    return page


def render(config: Config, data: RunData, figures: dict[str, str]) -> str:
    """The page's HTML; everything but our own plots and style is escaped."""
    template = files("lorapar_ray.reporting").joinpath("page.html.j2").read_text()
    style = files("lorapar_ray.reporting").joinpath("style.css").read_text()
    versions: dict[str, str] = next((s["versions"] for s in reversed(data.stages.values()) if "versions" in s), {})
    return (
        Environment(autoescape=True)
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
            verdicts=verdicts(data.accuracy),
            versions=versions,
        )
    )


def verdicts(accuracy: dict[str, dict[str, Any]]) -> list[str]:
    """What the intervals allow one to say about each step, a sentence each."""
    said = []
    for before, after in (("base", "sft"), ("sft", "grpo")):
        if before not in accuracy or after not in accuracy:
            continue
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


def _drawable(data: RunData) -> list[charts.Draw]:
    draws: list[charts.Draw] = []
    if data.accuracy:
        draws.append(charts.accuracies)
    if any("seconds" in stage for name, stage in data.stages.items() if name != "report"):
        draws.append(charts.seconds)
    if data.labels:
        draws += [charts.label_split, charts.tasks]
        if data.labels["votes"]:
            draws.append(charts.confidence)
    if data.partition:
        draws += [charts.layers, charts.modules]
        if "curves" in data.partition:
            draws += [charts.theta, charts.overlap]
    if data.scatter:
        draws.append(charts.scatter)
    if data.sft:
        draws.append(charts.sft_loss)
    if data.grpo:
        draws += [charts.reward, charts.length, charts.ratio, charts.gaps, charts.phases]
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
