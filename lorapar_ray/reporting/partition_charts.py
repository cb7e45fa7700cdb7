"""The report's plots of the partition: the important elements of each System, and whether they differ by more than
noise."""

from __future__ import annotations

from typing import Any

from lorapar_ray.reporting.charts import INK, QUIET, SHARED, SYSTEM1, SYSTEM2
from lorapar_ray.reporting.data import RunData

REGIONS = {"system1_only": SYSTEM1, "system2_only": SYSTEM2, "shared": SHARED, "none": QUIET}
REGION_LABELS = {
    "system1_only": "System 1 only",
    "system2_only": "System 2 only",
    "shared": "shared",
    "none": "neither",
}
THETAS = tuple(tenth / 10 for tenth in range(1, 11))
PAPER_KEPT = {
    "qkvgud": (0.32, 1.22, 2.72, 4.90, 7.91, 12.07, 17.87, 26.40, 40.56, 100.0),
    "qkv": (0.30, 1.03, 2.20, 3.93, 6.39, 9.88, 14.90, 22.52, 35.70, 100.0),
    "gud": (0.22, 1.21, 2.89, 5.30, 8.61, 13.10, 19.30, 28.27, 42.90, 100.0),
}
"""Share of parameters kept at each θ, in %, LLaMA2-7B on GSM8K (arXiv 2507.20999, θ sweep)."""


def scatter(axis: Any, run: RunData) -> None:
    """Importance for System 1 against importance for System 2, coloured by region."""
    assert run.scatter is not None
    for region, colour in reversed(REGIONS.items()):
        chosen = [i for i, name in enumerate(run.scatter["region"]) if name == region]
        xs, ys = ([run.scatter[axis_name][i] for i in chosen] for axis_name in ("system1", "system2"))
        axis.scatter(xs, ys, s=4, alpha=0.55, linewidths=0, color=colour, label=REGION_LABELS[region], rasterized=True)
    finite = [v for name in ("system1", "system2") for v in run.scatter[name] if v > -40]
    low, high = sorted(finite)[len(finite) // 200], max(finite)
    axis.set(xlim=(low, high + 0.2), ylim=(low, high + 0.2))
    axis.set(
        title="Importance of every element", xlabel="log₁₀ importance, System 1", ylabel="log₁₀ importance, System 2"
    )
    axis.legend(markerscale=3, loc="upper left", fontsize=8)


def theta(axis: Any, run: RunData, subset: str = "qkvgud") -> None:
    """Share of elements kept at each θ, with the paper's row."""
    assert run.partition is not None
    curves = run.partition["curves"]
    for system, colour in (("system1", SYSTEM1), ("system2", SYSTEM2)):
        kept = [100 * share for share in curves[subset][system]]
        axis.plot(curves["theta"], kept, "o-", color=colour, label=f"System {system[-1]}", markersize=4)
    axis.plot(THETAS, PAPER_KEPT[subset], "--", color=INK, label="paper, LLaMA2-7B", linewidth=1)
    axis.axvline(run.partition["theta"], color=QUIET, zorder=0)
    axis.set(title=f"θ curve, {subset.upper()}", xlabel="θ", ylabel="% of elements kept", yscale="log")
    axis.legend(loc="upper left", fontsize=8)


def overlap(axis: Any, run: RunData) -> None:
    """Jaccard index of the two kept sets at each θ."""
    assert run.partition is not None
    curves = run.partition["curves"]
    for subset, colour in (("qkvgud", SHARED), ("qkv", SYSTEM1), ("gud", SYSTEM2)):
        if subset in curves:
            axis.plot(
                curves["theta"], curves[subset]["jaccard"], "o-", color=colour, label=subset.upper(), markersize=4
            )
    axis.set(title="Overlap of the Systems", xlabel="θ", ylabel="Jaccard index", ylim=(0, 1.02))
    axis.legend(fontsize=8)


def _shares(axis: Any, groups: dict[str, Any], title: str, xlabel: str) -> None:
    bottom = [0.0] * len(groups)
    for region in ("shared", "system1_only", "system2_only"):
        heights = [100 * group["shares"][region] for group in groups.values()]
        axis.bar(list(groups), heights, bottom=bottom, color=REGIONS[region], label=REGION_LABELS[region], width=0.85)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axis.set(title=title, xlabel=xlabel, ylabel="% of elements")


def layers(axis: Any, run: RunData) -> None:
    """Region shares in each decoder layer."""
    assert run.partition is not None
    groups = dict(sorted(run.partition["by_layer"].items(), key=lambda item: int(item[0])))
    _shares(axis, groups, "Regions by layer", "layer")
    axis.set_xticks(list(groups)[:: max(1, len(groups) // 10)])


def modules(axis: Any, run: RunData) -> None:
    """Region shares in each module type, A and B apart."""
    assert run.partition is not None
    _shares(axis, run.partition["by_matrix"], "Regions by module and matrix", "")
    axis.tick_params(axis="x", rotation=60)
    axis.legend(fontsize=8)


def heat(axis: Any, run: RunData, system: str) -> None:
    """Share of elements kept for one System, by layer and by module and matrix."""
    assert run.partition is not None
    table = run.partition["heat"]
    kept = [[float("nan") if share is None else 100 * share for share in row] for row in table[system]]
    image = axis.imshow(kept, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    axis.set_xticks(range(len(table["matrices"])), table["matrices"], rotation=60)
    every = max(1, len(table["layers"]) // 8)
    axis.set_yticks(range(0, len(table["layers"]), every), table["layers"][::every])
    axis.grid(False)
    axis.set(title=f"Kept for System {system[-1]}, % of elements", ylabel="layer")
    axis.figure.colorbar(image, ax=axis, fraction=0.04)


def signal(axis: Any, run: RunData) -> None:
    """Overlap of halves of one System and of halves of different Systems, with growing numbers of scored examples."""
    assert run.partition is not None
    control = run.partition["control"]
    scored = [sum(point["examples"]) / 2 for point in control]
    for name, colour, label in (
        ("system1", SYSTEM1, "within System 1"),
        ("system2", SYSTEM2, "within System 2"),
        ("across", INK, "across Systems"),
    ):
        axis.plot(scored, [p["jaccard"][name] for p in control], "o-", color=colour, label=label, markersize=4)
    axis.set(title="Signal or noise?", xlabel="scored examples per System", ylabel="Jaccard index of halves")
    axis.legend(fontsize=8)
