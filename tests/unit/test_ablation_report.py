"""A grid's tables and page hold what is finished."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from lorapar_ray.ablations.charts import frontier, losses
from lorapar_ray.ablations.description import described
from lorapar_ray.ablations.grids import GRIDS
from lorapar_ray.ablations.paper import Figures
from lorapar_ray.ablations.plan import make_plan
from lorapar_ray.ablations.report import chosen_rates, report
from lorapar_ray.ablations.results import Outcome, summarise
from lorapar_ray.ablations.tables import accuracy_table
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import ROOT
from tests.unit.finished_units import record_finished

SHIPPED = ROOT / "jobs" / "configs"


def test_the_tables_hold_what_is_finished(tmp_path: Path) -> None:
    two = ["importance", "random"]
    plan = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1, 2, 3], only=two, rates=[1])

    def finish(arm: str, seed: int, name: str, right: int) -> None:
        folder = RunDirectory(tmp_path / f"{arm}-{seed}").eval
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.table({"id": [str(each) for each in range(100)], "right": [each < right for each in range(100)]})
        pq.write_table(table, folder / f"{name}.parquet")
        (folder / f"{name}.json").write_text("{}")

    adapter = RunDirectory(tmp_path / "importance-1").adapter / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(30, 50), "b": torch.zeros(500)}, adapter)
    metrics = RunDirectory(tmp_path / "importance-1").metrics
    metrics.mkdir()
    (metrics / "sft.jsonl").write_text('{"step": 1, "loss": 1.0, "active_share": 0.4}\n')
    finish("importance", 1, "base", 10)
    for seed in (1, 2, 3):
        finish("importance", seed, "sft", 50 + seed)
        finish("random", seed, "sft", 30 + seed)
    assert report(plan).count("\n") == 2  # no run says that these are its results
    for unit in plan.units({}):
        record_finished(unit)
    text = report(plan)
    assert re.search(r"^\| base \| – \| – \| 10\.0% \|.*\| – \|$", text, re.M)  # the paper has no such figure
    assert "| importance | 0.001 | 40.0% (800) | 52.0% |" in text
    assert "- **held**: The importance mask beats a random one of its size" in text
    table = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["arm"] for row in table] == ["base", "importance", "random"]
    base, importance, _ = table
    assert (
        base | {"learning rate, least": "", "accuracy": "0.1", "n": "100", "seed 1": "", "95 % low": "0.0552291"}
        == base
    )
    numbers = {"learning rate, most": "0.001", "trained share, least": "0.4", "trained elements, most": "800"}
    numbers |= {"accuracy": "0.52", "95 % high": "0.615354", "seed 1": "0.51", "seed 2": "0.52", "seed 3": "0.53"}
    assert importance | numbers == importance
    assert r"52.0\% & " in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    page = (tmp_path / "index.html").read_text()
    assert "| 1: 51.0%, 2: 52.0%, 3: 53.0% |" in text
    assert page.count("<svg") == 3 and "6 of 6 runs are evaluated" in page
    assert "Stage 1 by mask, all at one learning rate." in page and "its own learning rate" not in page + text
    assert "✓ held" in page and "importance − random" in page and not re.search(r'(src|href)="(?!#)', page)
    assert "52.0% | 42.3% – 61.5% | 100 |" in text  # over the questions, each of which counts once
    report(plan, ["random, seed 1: <b>"])
    assert "random, seed 1: &lt;b&gt;" in (tmp_path / "index.html").read_text()


def test_a_seed_without_results_and_what_varies_by_seed_are_seen() -> None:
    found = [Outcome(seed, {"a": True, "b": seed > 3}, 1e-3, 0.4 + seed / 100, 800 + seed) for seed in (1, 3, 4)]
    table = accuracy_table(GRIDS["mask"], None, {"random": summarise("random", found)}, Figures("7B"), [], "")
    assert "| random | 0.001 | 41.0% – 44.0% (801 – 804) |" in table.markdown()
    assert "| 1: 50.0%, 3: 50.0%, 4: 100.0% |" in table.markdown()
    [row] = csv.DictReader(table.comma_separated().splitlines())
    assert row["trained share, least"] == "0.41" and row["trained share, most"] == "0.44"
    assert row["trained elements, least"] == "801" and row["trained elements, most"] == "804"
    assert [name for name in row if name.startswith("seed")] == ["seed 1", "seed 3", "seed 4"] and row["seed 4"] == "1"
    assert "41.0\\% – 44.0\\%" in table.latex()


def test_a_line_of_the_frontier_goes_through_points_with_a_gain() -> None:
    """As lines are compared; a point that lost is a mark of its own."""

    def path(*points: tuple[float, float]) -> list[str]:
        drawn = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: none[^"]*"', frontier({"one": points}))
        return [each for each in drawn if each.count("L") >= 1]

    gained = ((0.1, 0.05), (0.3, 0.09))
    [line] = (each for each in path(*gained) if each.count("L") == 2)
    assert [each.count("L") for each in path(*gained, (-0.1, 0.5))].count(2) == 1 and line
    assert not [each for each in path(*gained, (-0.1, 0.5)) if each.count("L") == 3]
    one, two = (frontier({"one": points}).count("<use ") for points in (gained, (*gained, (-0.1, 0.5))))
    assert two > one  # its mark


def test_the_rate_is_chosen_by_what_the_compared_runs_keep(tmp_path: Path) -> None:
    """Those without a validation split end at the last step; a loss that is no number is never chosen."""
    losses = {
        0.25: (1.2, 1.1),
        0.5: (1.0, 1.05),
        1: (0.5, 1.3),
        2: (float("nan"), float("nan")),
        4: (0.9, float("inf")),
    }

    def chosen(folder: Path, *overrides: str) -> dict[str, float]:
        plan = make_plan("mask", SHIPPED / "arithmetic.yaml", overrides, folder, seeds=[1], only=["random"])
        assert chosen_rates(plan) == {}
        for unit in plan.sweeps:
            unit.run.metrics.mkdir(parents=True)
            lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses[unit.rate or 0])]
            (unit.run.metrics / "sft_validation.jsonl").write_text("\n".join(lines) + "\n")
            assert chosen_rates(plan) == {}  # not before all have finished
            record_finished(unit)
        longer = make_plan("mask", SHIPPED / "arithmetic.yaml", ["sft.epochs=9"], folder, seeds=[1], only=["random"])
        assert chosen_rates(longer) == {}  # these losses are of other settings
        return chosen_rates(plan)

    assert chosen(tmp_path / "last", "sft.validation=0", "sft.patience=null") == {"random": 0.5}
    assert chosen(tmp_path / "best", "sft.validation=0.2") == {"random": 1}
    assert chosen(tmp_path / "kept", "sft.validation=0.2", "sft.keep=last") == {"random": 0.5}


def test_a_rate_at_an_end_of_its_sweep_decides_nothing(tmp_path: Path) -> None:
    """A better one may be beyond it: random masks need far higher rates (arXiv 2405.02596)."""
    best = {"importance": 0.5, "random": 1, "swapped": 2, "magnitude": 1}
    plan = make_plan(
        "mask", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1, 2, 3], only=[*best], rates=[2, 0.5, 1]
    )
    for unit in plan.sweeps:
        unit.run.metrics.mkdir(parents=True)
        loss = {"step": 1, "loss": abs((unit.rate or 0) - best[unit.arm])}
        (unit.run.metrics / "sft_validation.jsonl").write_text(json.dumps(loss) + "\n")
        unit.run.labels.mkdir()
        labels = {"system": [1] * (300 if unit.arm == "random" else 250) + [2] * 41}
        pq.write_table(pa.table(labels), unit.run.labels / "part-00000.parquet")
        record_finished(unit)
    shown = "\n".join(described(plan))
    assert "the lowest loss on 10% of the training rows (29 to 34 rows)" in shown
    rates = chosen_rates(plan)
    assert rates == best and plan.ends(rates) == {"importance": "lowest", "swapped": "highest"}
    for unit in plan.units(rates):
        unit.run.eval.mkdir(parents=True)
        right = 600 if unit.arm == "importance" else 300 if unit.arm == "random" else 100
        table = {"id": [str(q) for q in range(1000)], "right": [q < right for q in range(1000)]}
        pq.write_table(pa.table(table), unit.run.eval / "sft.parquet")
        (unit.run.eval / "sft.json").write_text("{}")
        record_finished(unit)
    text = report(plan)
    assert "| importance | 0.0005 (lowest tried) |" in text and "| swapped | 0.002 (highest tried) |" in text
    assert "| random | 0.001 |" in text
    assert "that of the lowest loss on 29 to 34 held-out rows with seed 1, of 0.5, 1, 2 times the config's." in text
    assert re.search(
        r"- \*\*undecided\*\*: The importance mask beats a random .* \+30\.0 points .* importance's is the l", text
    )
    assert "importance's is the lowest and swapped's is the highest, so a better one may be beyond (--rates)" in text
    wider = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1], only=["random"])
    assert "random" not in wider.ends({"random": 1}) and wider.ends({"random": 4}) == {"random": "highest"}
    assert replace(wider, rates=(1,)).ends({"random": 1}) == {}  # no sweep


def test_an_arm_without_a_finished_sweep_is_not_compared(tmp_path: Path) -> None:
    """Its finished runs are at the config's own rate; and another arm's run evaluates the base."""
    two = ["importance", "random"]
    plan = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1, 2, 3], only=two)
    for unit in plan.sweeps:
        if unit.arm == "random":
            unit.run.metrics.mkdir(parents=True)
            (unit.run.metrics / "sft_validation.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
            record_finished(unit)
    rates = chosen_rates(plan)
    assert rates.keys() == {"random"}
    for unit in [*(each for each in plan.units({}) if each.arm == "importance"), *plan.compared(rates)]:
        unit.run.eval.mkdir(parents=True)
        for name in unit.config.evaluated:
            pq.write_table(pa.table({"id": ["a", "b"], "right": [True, False]}), unit.run.eval / f"{name}.parquet")
            (unit.run.eval / f"{name}.json").write_text("{}")
        record_finished(unit)
    assert [unit.title for unit in plan.compared(rates)] == [f"random, seed {seed}" for seed in (1, 2, 3)]
    text = report(plan)
    assert "| random |" in text and "| base |" in text and "| importance |" not in text
    assert "importance and random are not compared, since no seed has results of both, so it is undecided." in text
    assert "3 of 6 runs are evaluated" in (tmp_path / "index.html").read_text()
    fresh = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path / "fresh", seeds=[1, 2, 3], only=two)
    evaluating = [unit.title for unit in fresh.compared({"random": 1}) if "base" in unit.config.evaluated]
    assert evaluating == ["random, seed 1"]
    assert report(fresh).count("\n") == 2  # nothing is finished


def test_a_claim_counts_no_comparison_that_the_config_does_not_allow(tmp_path: Path) -> None:
    """A vote of five needs five teachers; without them its line could never be decided."""

    def arms(*overrides: str) -> set[str]:
        plan = make_plan("strategies", SHIPPED / "quickstart.yaml", overrides, tmp_path, seeds=[1], only=["vote"])
        return {name for claim in plan.claims for name in (claim.better, claim.worse)}

    own = [f"{{name: t{n}, kind: python, model: 'lorapar_ray.labeling.simulated:SimulatedTeacher'}}" for n in range(5)]
    everything = {name for claim in GRIDS["strategies"].claims for name in (claim.better, claim.worse)}
    assert arms(f"label.teachers=[{', '.join(own)}]", "label.calibration=none") == everything
    assert "vote-5" in everything and arms() == everything - {"vote-5"}


def test_every_line_of_a_plot_of_losses_has_a_style_of_its_own() -> None:
    """The grid theta has 39 arms; a plot has colours and dashes for 28, and no reader tells so many apart."""
    arms = [arm.name for arm in GRIDS["theta"].arms]
    assert len(arms) == 39
    plots = losses({arm: [([1, 2, 3], [3.0, 2.0 + number / 100, float("nan")])] for number, arm in enumerate(arms)})
    assert len(plots) == 3 and [f"({part} of 3)" in plot for part, plot in enumerate(plots, start=1)] == [True] * 3
    shown = [[arm for arm in arms if f">{arm}<" in plot] for plot in plots]
    assert [name for part in shown for name in part] == arms and {len(part) for part in shown} == {13}
    for plot in plots:
        curves = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="fill: none; ?([^"]*)"', plot)
        assert len({style for style in curves if "stroke-width: 1.8" in style}) == 13
    ticks = [re.findall(r">(−?[\d.]+)</text>", plot) for plot in plots]
    assert ticks[0] and ticks[0] == ticks[1] == ticks[2]  # the same axes
    assert len(losses({arm: [([1], [1.0])] for arm in arms[:14]})) == 1


def test_rl_after_a_stronger_stage_is_decided_only_where_the_stage_is_stronger(tmp_path: Path) -> None:
    arms = {"a0-b0.5": (300, 500), "a1-b0.5": (400, 700), "a0-b1": (300, 500), "a1-b1": (301, 800)}
    plan = make_plan(
        "activation", SHIPPED / "arithmetic-grpo.yaml", [], tmp_path, seeds=[1, 2, 3], only=[*arms, "a0-b0"]
    )
    assert all(unit.config.evaluated[-2:] == ["sft", "grpo"] for unit in plan.units({}))
    shown = "\n".join(described(plan))
    assert "decides whether RL after a stronger SFT stage ends higher (a1-b0.5 against a0-b0.5)" in shown
    for unit in plan.units({}):
        if unit.arm in arms:
            unit.run.eval.mkdir(parents=True)
            for stage, right in zip(("sft", "grpo"), arms[unit.arm], strict=True):
                table = {"id": [str(q) for q in range(1000)], "right": [q < right for q in range(1000)]}
                pq.write_table(pa.table(table), unit.run.eval / f"{stage}.parquet")
                (unit.run.eval / f"{stage}.json").write_text("{}")
            record_finished(unit)
    text = report(plan)
    claim = "RL after a stronger SFT stage ends higher"
    assert f"- **held**: {claim}: a1-b0.5 is +10.0 points (40.0% and 30.0%; 95 % interval" in text
    assert "and +20.0 points (70.0% and 50.0%; 95 % interval" in text
    assert re.search(
        rf"- \*\*undecided\*\*: {claim}: a1-b1 .*but its first stage is not shown to be the stronger", text
    )
    assert f"{claim}, in each of 3 comparisons: 1 held, 1 undecided, 1 not in this run, so it is undecided." in text
    few = make_plan("activation", SHIPPED / "arithmetic-grpo.yaml", [], tmp_path, seeds=[1, 2])
    shown = "\n".join(described(few))
    assert "decides whether" not in shown and "decides no claim: that needs 3 seeds, and --seeds gives 2" in shown
    assert (tmp_path / "stages.csv").read_text().splitlines()[:3] == [
        "arm,after sft,after grpo,seeds",
        "a0-b0.5,0.3,0.5,3",
        "a0-b1,0.3,0.5,3",
    ]
    assert "Accuracy after each stage" in (tmp_path / "index.html").read_text()
