"""The report's plots, each a pure function that draws on a matplotlib axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from lorapar_ray.reporting.data import MODELS, RunData
from lorapar_ray.text import one_line

SYSTEM1, SYSTEM2, SHARED, QUIET, INK = "#e07a3f", "#3a6ea5", "#6b4c9a", "#c9ced6", "#2b2f36"
SYSTEM_COLOURS = (SYSTEM1, SYSTEM2, SHARED, "#5b9a68", "#c2a33a", "#8a8f98", "#b0567a", "#4aa3a2", "#7a5c3e")

STYLE = {
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "font.size": 9,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lorapar",
    "text.parse_math": False,  # names of files and tasks may hold a dollar sign
}
TICK_LENGTH = 40
"""Most characters of a bar's name."""
Draw = Callable[[Any, RunData], None]


def label_split(axis: Any, run: RunData) -> None:
    """How many questions each System got, in all and by teacher."""
    assert run.labels is not None
    rows = {"majority": run.labels["split"]} | {name: t["split"] for name, t in run.labels["teachers"].items()}
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    for system, colour in zip(run.labels["split"], SYSTEM_COLOURS, strict=False):
        widths = [100 * rows[name][system] / max(1, sum(rows[name].values())) for name in names]
        bars = axis.barh(names, widths, left=left, color=colour, label=f"System {system}", height=0.6)
        axis.bar_label(bars, [str(rows[name][system]) for name in names], label_type="center", color="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set(title="Votes for each System", xlabel="% of questions", xlim=(0, 100))
    axis.legend(loc="upper right", bbox_to_anchor=(1.03, -0.06), ncol=2, fontsize=7, columnspacing=0.8, handlelength=1)


def confidence(axis: Any, run: RunData) -> None:
    """Histogram of the votes' calibrated confidence."""
    assert run.labels is not None
    edges, counts = (run.labels["confidence_histogram"][key] for key in ("edges", "counts"))
    axis.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge", color=SHARED, edgecolor="white")
    axis.set_xlim(edges[0], 1)
    axis.set(title="How sure the teachers are", xlabel="probability of the chosen System", ylabel="votes")


def tasks(axis: Any, run: RunData) -> None:
    """Labels by the source's own task; information only, no label is made from it."""
    assert run.labels is not None
    table = run.labels["by_task"]
    names = list(table)[::-1]
    left = [0.0] * len(names)
    ticks = range(len(names))  # two names may read the same once they are cut
    axis.set_yticks(ticks, [one_line(name, TICK_LENGTH) for name in names])
    for system, colour in zip(run.labels["split"], SYSTEM_COLOURS, strict=False):
        widths = [100 * table[name][system] / max(1, sum(table[name].values())) for name in names]
        axis.barh(ticks, widths, left=left, color=colour, height=0.6, label=f"System {system}")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set(title="Labels by the generator's own task", xlabel="% of questions", xlim=(0, 100))


def _curve(axis: Any, lines: Sequence[dict[str, Any]], key: str, colour: str, label: str | None = None) -> None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
    axis.plot(steps, smoothed(values), color=colour, linewidth=2, label=label)


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average; each new value has weight 0.3."""
    found, mean = [], values[0]
    for value in values:
        mean += 0.3 * (value - mean)
        found.append(mean)
    return found


def sft_loss(axis: Any, run: RunData) -> None:
    """Stage 1's training loss."""
    _curve(axis, run.sft, "loss", SYSTEM1)
    axis.set(title="Stage 1: SFT loss", xlabel="step", ylabel="cross-entropy, nats/token")


def reward(axis: Any, run: RunData) -> None:
    """Stage 2's mean reward over every sampled group."""
    _curve(axis, run.grpo, "reward", SYSTEM2)
    axis.set(title="Stage 2: reward", xlabel="step", ylabel="mean reward")


def length(axis: Any, run: RunData) -> None:
    """Stage 2's completion length."""
    _curve(axis, run.grpo, "completion_length", SYSTEM2)
    axis.set(title="Stage 2: completion length", xlabel="step", ylabel="tokens")


def ratio(axis: Any, run: RunData) -> None:
    """Learner over sampler probability of the sampled tokens: mean, smallest, largest."""
    for key, colour in (("ratio_max", QUIET), ("ratio_min", QUIET), ("ratio_mean", SYSTEM2)):
        points = [(line["step"], line[key]) for line in run.grpo if key in line]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, label=key.replace("_", " "))
    axis.set(title="Stage 2: learner/sampler ratio", xlabel="step", ylabel="probability ratio")
    axis.legend(fontsize=8)


def gaps(axis: Any, run: RunData) -> None:
    """Check of the served policy: log-probability gaps between learner and engine."""
    _curve(axis, run.grpo, "canary_gap", SHARED, "canary tokens")
    _curve(axis, run.grpo, "logprob_gap", SYSTEM2, "sampled tokens")
    axis.set(title="Stage 2: learner against engine", xlabel="step", ylabel="mean |Δ log p|, nats")
    axis.legend(fontsize=8)


def phases(axis: Any, run: RunData) -> None:
    """Seconds of a step by phase."""
    names = [key for key in ("rollout", "reward", "learn", "sync") if f"seconds/{key}" in run.grpo[0]]
    bottom = [0.0] * len(run.grpo)
    for name, colour in zip(names, (SYSTEM2, SYSTEM1, SHARED, QUIET), strict=False):
        values = [line.get(f"seconds/{name}", 0.0) for line in run.grpo]
        axis.bar([line["step"] for line in run.grpo], values, bottom=bottom, color=colour, label=name, width=0.9)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axis.set(title="Stage 2: seconds of a step", xlabel="step", ylabel="s")
    axis.legend(fontsize=8)


def idle(axis: Any, run: RunData) -> None:
    """Share of its time that each side of stage 2 waits for the other."""
    _curve(axis, run.grpo, "idle/learner", SHARED, "learner")
    _curve(axis, run.grpo, "idle/engines", SYSTEM2, "rollout engines")
    axis.set(title="Stage 2: idle share", xlabel="step", ylabel="share of the time", ylim=(0, 1))
    axis.legend(fontsize=8)


def accuracies(axis: Any, run: RunData) -> None:
    """Greedy accuracy with its 95 % interval, overall and by task."""
    first = next(iter(run.accuracy.values()))
    groups = ["all", *first["by_task"]]
    colours = {"base": INK, "sft": SYSTEM1, "grpo": SYSTEM2}
    colours |= {f"sft-{system}": SYSTEM_COLOURS[system % len(SYSTEM_COLOURS)] for system in range(1, 10)}
    apart, middle = min(0.22, 0.66 / len(run.accuracy)), max(1, (len(run.accuracy) - 1) / 2)
    for offset, (name, result) in enumerate(run.accuracy.items()):
        for place, group in enumerate(groups):
            entry = result if group == "all" else result["by_task"][group]
            low, high = entry["interval"]
            y = place + apart * (offset - middle)
            axis.plot([100 * low, 100 * high], [y, y], color=colours[name], linewidth=2, alpha=0.6)
            axis.plot(100 * entry["accuracy"], y, "o", color=colours[name], label=MODELS[name] if not place else None)
    axis.set_yticks(range(len(groups)), [one_line(group, TICK_LENGTH) for group in groups])
    axis.invert_yaxis()
    axis.set(title=f"Accuracy, n = {first['n']}, 95 % intervals", xlabel="% right", xlim=(0, 100))
    axis.legend(fontsize=8)


def seconds(axis: Any, run: RunData) -> None:
    """Wall-clock time of each finished stage."""
    spent = {name: stage["seconds"] for name, stage in run.stages.items() if "seconds" in stage and name != "report"}
    bars = axis.barh(list(spent)[::-1], list(spent.values())[::-1], color=SYSTEM2, height=0.6)
    axis.bar_label(bars, fmt="%.0f s", padding=3)
    axis.set(title="Time by stage", xlabel="s")


def svg(draw: Draw, run: RunData) -> str:
    """One plot as an SVG element."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained", dpi=110)
        draw(axis, run)
        return svg_of(figure)


def svg_of(figure: Any) -> str:
    """A figure as an SVG element; it is closed."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def overview(path: Path, run: RunData, panels: Sequence[Draw]) -> None:
    """Up to six plots as one PNG."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(13.5, 7.2), layout="constrained", dpi=100)
        for axis, draw in zip(axes.flat, panels, strict=False):
            draw(axis, run)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        figure.savefig(path, format="png")
        plt.close(figure)
