"""The Grafana dashboard: every query uses an existing metric."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import ray
import torch

from lorapar_ray.run_metrics import FIGURE_METRICS, PROGRESS_METRICS
from lorapar_ray.sft.step_log import StepLog
from tests.tiny_run import ROOT

DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "lorapar.json").read_text())
RAYS_OWN = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards/default_dashboard_panels.py"


def queries() -> Iterator[str]:
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", []))
    yield from (each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query")


def figures(stage: str) -> set[str]:
    """The training metrics of the dashboard."""
    return {
        found for query in queries() for found in re.findall(rf'ray_lorapar_{stage}\{{[^}}]*figure="([^"]+)"', query)
    }


def test_every_metric_is_one_of_ours_or_of_rays() -> None:
    asked = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    ours = {f"ray_{name}" for name in (*PROGRESS_METRICS, *FIGURE_METRICS)}
    assert ours <= asked
    shown_by_ray = set(re.findall(r"\bray_\w+", RAYS_OWN.read_text()))
    assert asked - ours and asked - ours <= shown_by_ray


def test_stage_1_reports_the_figures_that_the_dashboard_shows() -> None:
    """By its own log; the end-to-end test does the same for stage 2."""
    reported: set[str] = set()
    log = StepLog(None, lambda figures, step: reported.update(figures), active_share=0.5)
    log.put(1, torch.tensor(2.0), torch.tensor(1.0), 1e-3, tokens=64)
    log.validated(1, 1.5)
    assert figures("sft") and figures("sft") <= reported, figures("sft") - reported


def test_panels_have_unique_numbers_and_places() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23
    for panel in panels:
        assert panel["type"] == "row" or panel["targets"], panel["title"]
