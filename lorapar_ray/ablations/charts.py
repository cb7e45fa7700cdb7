"""A grid's plots, readable without colour: by position, line style and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

from matplotlib import pyplot as plt

from lorapar_ray.ablations.grid import Grid
from lorapar_ray.ablations.results import Summary, Verdict
from lorapar_ray.ablations.sequence import Matrix
from lorapar_ray.reporting.charts import INK, QUIET, STYLE, SYSTEM2, smoothed, svg_of

Line = tuple[list[int], list[float]]
"""Steps, and a value at each."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's palette, safe for colour-blind readers."""
DASHES = ("-", "--", ":", "-.")
TOGETHER = 14
"""Most lines of one plot: so many have a colour and a dash of their own, and more cannot be told apart."""
WIDTH = 5.4
"""Size of a plot, in inches; it fits a phone without scrolling."""
MARKS = {"held": "o", "not held": "X", "undecided": "D"}


def accuracies(grid: Grid, base: Summary | None, found: Mapping[str, Summary]) -> str:
    """Accuracy of each arm with its interval, each seed a dot; an SVG."""
    shown = [found[arm.name] for arm in grid.arms if arm.name in found][::-1]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 1.4 + 0.32 * len(shown)), layout="constrained")
        for place, row in enumerate(shown):
            low, high = row.interval
            axis.plot([100 * low, 100 * high], [place, place], color=SYSTEM2, linewidth=2)
            seeds = [100 * each for each in row.by_seed.values()]
            axis.plot(seeds, [place] * len(seeds), "o", color=QUIET, markersize=4)
            axis.plot(100 * row.accuracy, place, "o", color=INK, markersize=6)
        if base is not None:
            axis.axvline(100 * base.accuracy, color=QUIET, linestyle="--", label="base")
            figure.legend(loc="outside lower left", ncol=3)
        axis.set(title=f"{grid.name}: accuracy", xlabel="% right (95 % interval; small dots: seeds)")
        axis.set_yticks(range(len(shown)), [row.arm for row in shown])
        return svg_of(figure)


def effects(verdicts: Sequence[Verdict]) -> str:
    """The difference of each claim with its interval; an SVG."""
    shown = list(verdicts)[::-1]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 1.5 + 0.36 * len(shown)), layout="constrained")
        axis.axvline(0, color=INK, linewidth=1)
        for kind, mark in MARKS.items():
            places = [place for place, each in enumerate(shown) if each.found == kind]
            for place in places:
                low, high = shown[place].effect.interval
                axis.plot([100 * low, 100 * high], [place, place], color=SYSTEM2, linewidth=3)
                low, high = shown[place].effect.deciding
                axis.plot([100 * low, 100 * high], [place, place], color=SYSTEM2, linewidth=1)
            if places:
                values = [100 * shown[place].effect.difference for place in places]
                axis.plot(values, places, mark, color=INK, markersize=7, label=kind, linestyle="none")
        axis.set_yticks(range(len(shown)), [f"{each.claim.better} − {each.claim.worse}" for each in shown])
        axis.set(title="Differences", xlabel="points of accuracy\n(thick: 95 % interval; thin: the one that decides)")
        figure.legend(loc="outside lower left", ncol=3)
        return svg_of(figure)


def losses(lines: Mapping[str, Sequence[Line]]) -> list[str]:
    """Stage 1's loss by arm, the mean over seeds, smoothed; SVGs with the same axes and up to `TOGETHER` arms each."""
    shown = {arm: (steps, smoothed(mean)) for arm, (steps, mean) in ((arm, mean_line(s)) for arm, s in lines.items())}
    arms = list(shown)
    parts = -(-len(arms) // TOGETHER)
    size = -(-len(arms) // parts)
    limits = [_around([value for line in shown.values() for value in line[place]]) for place in (0, 1)]
    found = []
    for part in range(parts):
        with plt.rc_context(STYLE):
            own = arms[part * size : (part + 1) * size]
            figure, axis = plt.subplots(figsize=(WIDTH, 3.4 + 0.2 * len(own) / 2), layout="constrained")
            for number, arm in enumerate(own):
                style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
                axis.plot(*shown[arm], linewidth=1.8, label=arm, **style)
            of = f" ({part + 1} of {parts})" if parts > 1 else ""
            axis.set(title=f"Stage 1: loss, mean over seeds{of}", xlabel="step", ylabel="cross-entropy, nats/token")
            axis.set(xlim=limits[0], ylim=limits[1])
            figure.legend(loc="outside lower left", ncol=2)
            found.append(svg_of(figure))
    return found


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis, with a margin."""
    finite = [each for each in values if isfinite(each)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def frontier(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The loss of the first stage's skill against the gain in the second's, by line; an SVG.

    A line goes through the points with a gain, as it is compared; the others are hollow marks without a line.

    Args:
        lines: by name, (gain, cost) of each arm, means over seeds.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
        axis.axhline(0, color=INK, linewidth=1)
        for number, (name, points) in enumerate(lines.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "osD^"[number % 4]}
            gained = [(0.0, 0.0), *sorted(each for each in points if each[0] > 0)]
            axis.plot(*_percents(gained), label=name, linestyle=DASHES[number % len(DASHES)], **style)
            if others := [each for each in points if each[0] <= 0]:
                axis.plot(*_percents(others), linestyle="none", markerfacecolor="none", **style)
        axis.set(
            title="Loss of the first stage's skill in the second",
            xlabel="gained in the second stage's skill, points",
            ylabel="lost of the first stage's skill, points",
        )
        figure.legend(loc="outside lower left", ncol=2)
        return svg_of(figure)


def _percents(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [100 * gain for gain, _ in points], [100 * cost for _, cost in points]


def matrices(by_arm: Mapping[str, Matrix], systems: Sequence[int]) -> str:
    """Each arm's skills after every System of a sequence, written in the cells; an SVG."""
    names, columns = [str(system) for system in systems], min(2, len(by_arm))
    rows, most = -(-len(by_arm) // columns), max(value for each in by_arm.values() for row in each for value in row)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(WIDTH, 0.5 + 2.3 * rows), layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(by_arm) :]:
            axis.set_visible(False)
        for axis, (arm, skills) in zip(axes.flat, by_arm.items(), strict=False):
            axis.imshow([list(row) for row in skills], cmap="Blues", vmin=0, vmax=most or 1, aspect="auto")
            for k, row in enumerate(skills):
                for j, value in enumerate(row):
                    colour = "white" if value > 0.6 * most else INK
                    axis.text(j, k, f"{100 * value:.1f}", ha="center", va="center", color=colour)
            axis.set(title=arm, xlabel="tested on System", ylabel="after System")
            axis.set_xticks(range(len(names)), names)
            axis.set_yticks(range(len(names)), names)
        figure.suptitle("% right after training each System, mean over seeds", fontsize=10)
        return svg_of(figure)


def mean_line(seeds: Sequence[Line]) -> Line:
    """Means over the seeds, up to the last step that all have."""
    length = min(len(steps) for steps, _ in seeds)
    return seeds[0][0][:length], [sum(line[1][place] for line in seeds) / len(seeds) for place in range(length)]
