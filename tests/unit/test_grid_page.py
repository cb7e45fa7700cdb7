"""The page of a grid as a browser shows it on a phone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorapar_ray.ablations.plan import Plan, make_plan
from lorapar_ray.ablations.report import PAGE, report
from tests.browser import CHROMIUM, seen_on_a_phone
from tests.tiny_run import ROOT
from tests.unit.finished_units import finish_sequence, finish_skills, record_finished

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (apt-get install chromium)"),
]
CONFIGS = ROOT / "jobs" / "configs"
LONG = "unmasked-2, seed 3: '" + "a_folder_without_any_space" * 9 + "'"


def retention(out: Path) -> Plan:
    plan = make_plan("retention", CONFIGS / "quickstart.yaml", [], out, seeds=[1, 2, 3])
    for number, unit in enumerate(plan.units({})):
        skills = {"sft": (60, 20), "grpo": (60 - number // 3, 21 + number)}
        finish_skills(unit, skills | ({"base": (10, 11)} if not number else {}))
        unit.run.metrics.mkdir()
        lines = [json.dumps({"step": step, "loss": 2 / (step + 1)}) for step in range(9)]
        (unit.run.metrics / "sft.jsonl").write_text("\n".join(lines) + "\n")
        record_finished(unit)
    return plan


def systems(out: Path) -> Plan:
    plan = make_plan("systems", CONFIGS / "systems.yaml", [], out, seeds=[1, 2, 3])
    for number, unit in enumerate(plan.units({})):
        skills = {"sft-1": (60, 5, 6), "sft-2": (58 - number, 50, 6), "sft": (57 - number, 48, 70)}
        finish_sequence(unit, skills | ({"base": (10, 11, 12)} if not number else {}))
        record_finished(unit)
    return plan


def accuracies(name: str, out: Path, only: Sequence[str] = ()) -> Plan:
    """A grid of stage 1 alone, at one learning rate."""
    plan = make_plan(name, CONFIGS / "quickstart.yaml", [], out, seeds=[1, 2, 3], rates=[1.0], only=only)
    for number, unit in enumerate(plan.units({})):
        for folder in (unit.run.eval, unit.run.metrics):
            folder.mkdir(parents=True, exist_ok=True)
        for name in unit.config.evaluated:
            table = {"id": [str(q) for q in range(300)], "right": [q < 50 + 2 * number for q in range(300)]}
            pq.write_table(pa.table(table), unit.run.eval / f"{name}.parquet")
            (unit.run.eval / f"{name}.json").write_text("{}")
        lines = [json.dumps({"step": step, "loss": 2 / (step + 1), "active_share": 0.4}) for step in range(9)]
        (unit.run.metrics / "sft.jsonl").write_text("\n".join(lines) + "\n")
        record_finished(unit)
    return plan


def mask(out: Path) -> Plan:
    """Without the arm whose adapters would be read."""
    arms = ("importance", "random", "magnitude", "first-order", "shuffled-labels", "swapped")
    return accuracies("mask", out, arms)


def theta(out: Path) -> Plan:
    return accuracies("theta", out)


@pytest.mark.parametrize(
    ("grid", "said", "plots"),
    [
        (retention, "keep more than", 3),
        (systems, "forget less than", 3),
        (mask, "beats a random one of its size", 3),
        (theta, "the chosen subset beats a random one", 5),  # losses of 39 arms are three plots
    ],
)
def test_a_phone_shows_the_whole_page(grid: Callable[[Path], Plan], said: str, plots: int, tmp_path: Path) -> None:
    plan = grid(tmp_path / "out")
    report(plan, [LONG])
    seen = seen_on_a_phone(plan.out / PAGE, tmp_path / "profile")
    assert seen.errors == [] and seen.page["broken"] == []
    assert seen.requests == []  # everything is inside the file
    assert seen.page["width"] == 390 == seen.page["scroll"] and seen.page["beyond"] == []
    assert seen.page["plots"] == plots and said.lower() in seen.page["text"].lower() and LONG in seen.page["text"]


def test_what_a_phone_cannot_show_is_found(tmp_path: Path) -> None:
    """The check above can fail."""
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width, initial-scale=1"><main><p>text</p>'
        '<img src="missing.png"><div id="wide" style="width: 600px">x</div></main>'
        "<script>console.error('a fault'); undefined_name()</script>"
    )
    seen = seen_on_a_phone(page, tmp_path / "profile")
    said = "\n".join(seen.errors)
    assert "a fault" in said and "undefined_name is not defined" in said and "ERR_FILE_NOT_FOUND" in said
    assert len(seen.page["broken"]) == 1 and seen.page["broken"][0].endswith("missing.png")
    assert seen.page["scroll"] > 390 and any('id="wide"' in each for each in seen.page["beyond"])
