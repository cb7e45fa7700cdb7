"""A partition in numbers: sizes of the regions, their place in the model, and the overlap of the two Systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorapar_ray.adapters.targets import layer_index, matrix, module_type
from lorapar_ray.partition.curves import theta_curves
from lorapar_ray.partition.regions import KEPT_1, KEPT_2, SHARED, STAGE_1, STAGE_2

_BYTES = np.arange(16)
_ROWS: dict[str, NDArray[np.bool_]] = {
    "system1_only": _BYTES & SHARED == KEPT_1,
    "system2_only": _BYTES & SHARED == KEPT_2,
    "shared": _BYTES & SHARED == SHARED,
    "none": _BYTES & SHARED == 0,
    "trained_stage1": _BYTES & STAGE_1 != 0,
    "trained_stage2": _BYTES & STAGE_2 != 0,
    "never_trained": _BYTES & (STAGE_1 | STAGE_2) == 0,
}
"""The region bytes that each row counts; the first four rows are disjoint and cover everything."""


def summarise(
    regions: Mapping[str, Tensor],
    *,
    theta: float,
    alpha: float,
    beta: float,
    scores1: Mapping[str, Tensor] | None = None,
    scores2: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """JSON-ready summary of `regions` (uint8 by adapter key); with both Systems' scores also the θ curves.

    Returns:
        "theta", "alpha", "beta"; "total" and, under "by_module", "by_matrix" and "by_layer", one entry per name: the
        number of "elements", and "counts" and "shares" (of those elements) of system1_only, system2_only, shared,
        none, trained_stage1, trained_stage2 and never_trained (keys outside the numbered layers are missing from
        "by_layer"); "heat": the share each System keeps as "system1" and "system2", a matrix of "layers" × "matrices";
        "overlap": the "jaccard" index of K1 and K2 and each System's own part as shares of their union,
        as the paper prints them; and "curves" (see `curves.theta_curves`).
    """
    histograms = {key: _histogram(region) for key, region in regions.items()}
    total = sum(histograms.values(), np.zeros(16, np.int64))
    layered = {key: histogram for key, histogram in histograms.items() if layer_index(key) is not None}
    summary = {
        "theta": theta,
        "alpha": alpha,
        "beta": beta,
        "total": _table(total),
        "overlap": _overlap(total),
        "by_module": _grouped(histograms, module_type),
        "by_matrix": _grouped(histograms, lambda key: f"{module_type(key)}.{matrix(key)}"),
        "by_layer": _grouped(layered, layer_index),
        "heat": _heat(layered),
    }
    if scores1 is not None and scores2 is not None:
        summary["curves"] = theta_curves(scores1, scores2)
    return summary


def _histogram(region: Tensor) -> NDArray[np.int64]:
    return np.bincount(region.reshape(-1).numpy(), minlength=16)


def _table(histogram: NDArray[np.int64]) -> dict[str, Any]:
    elements = int(histogram.sum())
    counts = {name: int(histogram[row].sum()) for name, row in _ROWS.items()}
    return {"elements": elements, "counts": counts, "shares": {name: n / elements for name, n in counts.items()}}


def _grouped(histograms: Mapping[str, NDArray[np.int64]], group_of: Callable[[str], Any]) -> dict[str, Any]:
    merged: dict[Any, NDArray[np.int64]] = {}
    for key, histogram in histograms.items():
        group = group_of(key)
        merged[group] = merged.get(group, 0) + histogram
    return {str(group): _table(merged[group]) for group in sorted(merged)}


def _heat(histograms: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    """Kept shares as a matrix of layers × "module.matrix" for each System; None where a layer lacks a module."""
    merged: dict[tuple[int, str], NDArray[np.int64]] = {}
    for key, histogram in histograms.items():
        place = (layer_index(key) or 0, f"{module_type(key)}.{matrix(key)}")
        merged[place] = merged.get(place, 0) + histogram
    layers, columns = (sorted(set(values)) for values in zip(*merged, strict=True)) if merged else ([], [])

    def share(layer: int, column: str, row: NDArray[np.bool_]) -> float | None:
        histogram = merged.get((layer, column))
        return None if histogram is None else int(histogram[row].sum()) / int(histogram.sum())

    kept = {"system1": _BYTES & KEPT_1 != 0, "system2": _BYTES & KEPT_2 != 0}
    shares = {name: [[share(layer, c, row) for c in columns] for layer in layers] for name, row in kept.items()}
    return {"layers": layers, "matrices": columns, **shares}


def _overlap(histogram: NDArray[np.int64]) -> dict[str, float]:
    counts = {name: int(histogram[_ROWS[name]].sum()) for name in ("system1_only", "system2_only", "shared")}
    union = sum(counts.values())
    if union == 0:
        return {"jaccard": 1.0, "system1_only": 0.0, "system2_only": 0.0}
    return {
        "jaccard": counts["shared"] / union,
        "system1_only": counts["system1_only"] / union,
        "system2_only": counts["system2_only"] / union,
    }
