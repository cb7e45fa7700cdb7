"""Results of replaced adapters, cuts and labels are not shown as results of the new ones.

The stages' bodies are faked (see `faked_stages`); the command line, the manifest, the card, the page and the status are
real. The fakes' cut is replaced by a real one, and accuracies are written by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorapar_ray.ablations.plan import Plan, make_plan
from lorapar_ray.ablations.report import chosen_rates, report
from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.files import digest, write_json
from lorapar_ray.pipeline import PIPELINE, is_done, standings
from lorapar_ray.reporting.page import write_report
from lorapar_ray.reporting.stage import STAGE as REPORT
from lorapar_ray.result_stages import state_of_run
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory
from lorapar_ray.status import lines
from tests.tiny_run import tiny_config, write_config
from tests.unit.faked_stages import lorapar, use_fakes

EPOCHS = ("--set", "sft.epochs=2")
THETA = "partition.theta=0.5"


class Cli:
    """A finished run, with the accuracies 20 % (base), 50 % (sft) and 70 % (grpo)."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, student: str = "no/such/student") -> None:
        use_fakes(monkeypatch)
        monkeypatch.setitem(PIPELINE, "report", replace(PIPELINE["report"], run=REPORT.run))
        monkeypatch.setitem(PIPELINE, "partition", replace(PIPELINE["partition"], run=self.cut))
        (folder / "rows.jsonl").write_text('{"prompt": "q", "answer": "1"}\n')
        tree: dict[str, Any] = {
            **tiny_config(Path(student)),
            "label": {"strategy": "random"},
            "data": {name: [{"reader": "file", "path": str(folder / "rows.jsonl")}] for name in ("train", "test")},
        }
        self.run = RunDirectory(folder / "run")
        self.config = write_config(folder / "config.yaml", tree)
        assert self("run")[0] == 0
        for name, right in (("base", 20), ("sft", 50), ("grpo", 70)):
            entry = {"n": 100, "correct": right, "accuracy": right / 100, "interval": [0.01, 0.99]}
            write_json(self.run.eval / f"{name}.json", {**entry, "by_task": {"sums": entry}})
        assert self("report", "--redo", "report")[0] == 0

    def __call__(self, command: str, *more: str | Path) -> tuple[int, str]:
        return lorapar(command, "-c", self.config, "-d", self.run.root, *more)

    def cut(self, config: Config, run: RunDirectory) -> dict[str, Any]:
        systems = {str(system): {"share": 0.25, "elements": 9, "importance": 0.5} for system in (1, 2)}
        cut = {"theta": config.partition.theta, "regions": "disjoint", "mask": "", "elements": 36, "jaccard": {}}
        write_json(run.partition / "systems.json", {**cut, "systems": systems, "control": {}})
        return {}

    def card(self, out: Path, stage: str) -> tuple[str, str]:
        """The card of an export, and what the command says."""
        folder = self.run.root / stage / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "adapter_config.json", {})
        status, said = lorapar("export", "-d", self.run.root, "--stage", stage, "-o", out)
        assert status == 0, said
        return (out / "README.md").read_text(), " ".join(said.split())

    def page(self) -> str:
        assert self("report")[0] == 0
        return (self.run.report / "index.html").read_text()


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(tmp_path, monkeypatch)


def note(page: str) -> str:
    """The line that names what is out of date."""
    found = re.search(r'<p class="warning" id="outdated">([^<]*)</p>', page)
    return found.group(1).replace("&#39;", "'") if found else ""


def test_a_run_whose_results_stand_shows_them(cli: Cli, tmp_path: Path) -> None:
    card, said = cli.card(tmp_path / "card", "sft")
    assert "| stage 1 (SFT) | 50.0%" in card and "epochs: 4" in card and "out of date" not in said
    page = cli.page()
    assert "out of date" not in page.lower() and 'class="tile"' in page and "this is" not in note(page)
    assert "out of date" not in (cli.run.report / "evaluation.html").read_text().lower()
    assert not any("out of date" in line for line in lines(cli.run))
    assert "nothing to do" in cli("run")[1]


def test_a_new_adapter_has_no_accuracy_of_the_old_one(cli: Cli, tmp_path: Path) -> None:
    assert cli("sft", "--redo", "sft", *EPOCHS)[0] == 0
    card, said = cli.card(tmp_path / "card", "sft")
    assert "epochs: 2" in card and "## Results" not in card and "50.0%" not in card and "points" not in card
    assert "## Regions" in card and "the card leaves out results that are out of date" in said
    assert "grpo (sft has other results), evaluate (sft has other results)" in said
    told = {line.split()[1]: line for line in list(lines(cli.run))[1:]}
    assert "out of date" not in told["sft"] and "out of date (sft has other results" in told["grpo"]
    assert "out of date (sft has other results)" in told["evaluate"]
    assert cli("grpo", "--redo", "grpo", *EPOCHS)[0] == 0
    assert cli("evaluate", "--redo", "evaluate", *EPOCHS)[0] == 0
    assert not state_of_run(load_config(cli.run.root / "config.yaml"), cli.run).outdated
    assert not any("out of date" in line for line in lines(cli.run))


def test_a_new_cut_makes_adapters_and_their_accuracies_old(cli: Cli) -> None:
    run_stage(load_config(cli.config, [THETA]), cli.run, "partition", "yes")
    cli.config = cli.run.root / "config.yaml"
    page = cli.page()
    why = "sft (partition has other results), grpo (partition has other results), "
    why += "evaluate (sft is out of date; grpo is out of date)"
    assert note(page) == f"Out of date with what is in the run now: {why}."
    assert "At θ = 0.5" in page and 'class="tile"' not in page and "points" not in page
    third, fifth = page.index('id="sft"'), page.index('id="accuracy"')
    assert '<p class="warning">Out of date: partition has other results.</p>' in page[third : third + 300]
    assert '<p class="warning">Out of date: sft is out of date' in page[fifth : fifth + 300]
    plot = page.index('id="plot-accuracies"')
    assert "95 % intervals · out of date" in page[plot : page.index("</figure>", plot)]
    assert "evaluate (sft is out of date" in (cli.run.report / "evaluation.html").read_text()


def test_the_page_is_written_again_when_other_results_are_out_of_date(cli: Cli) -> None:
    """Also if no stage has other results: only a setting was changed, or a stage is being replaced."""
    before = cli.page()
    assert cli("report", *EPOCHS)[0] == 0
    changed = (cli.run.report / "index.html").read_text()
    assert note(changed).startswith("Out of date with what is in the run now: sft (sft.epochs 4 → 2), grpo (sft is")
    assert standings(load_config(cli.config), cli.run)["report"].state == "changed"
    assert cli.page() == before
    entry = cli.run.entry("sft")
    stages = cli.run.manifest()["stages"] | {"sft": {**entry, "status": "started", "outputs": None}}
    write_json(cli.run.manifest_path, {**cli.run.manifest(), "stages": stages})
    assert is_done(load_config(cli.config), cli.run, "grpo")
    assert "grpo (sft has not finished), evaluate (grpo is out of date; sft has not finished)" in note(cli.page())


def test_a_stage_that_the_order_leaves_out_is_named(cli: Cli) -> None:
    assert cli("report", "--set", "order=[sft]")[0] == 0
    assert "grpo (not in this run's order [sft])" in note((cli.run.report / "index.html").read_text())


def test_changed_data_leave_the_adapter_to_be_exported(cli: Cli, tmp_path: Path) -> None:
    """Its settings are still those of the config; which of the results belong to the new rows is unknown."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "another", "answer": "1"}\n')
    card, said = cli.card(tmp_path / "card", "sft")
    assert "epochs: 4" in card and "## Results" not in card and "rows.jsonl' has changed" in said


def test_a_run_of_the_first_format_is_reported(cli: Cli) -> None:
    shutil.rmtree(cli.run.root)
    shutil.copytree(Path(__file__).parent / "legacy_run", cli.run.root)
    (cli.run.partition / "summary.json").unlink()  # of a faked body
    write_json(cli.run.eval / "base.json", {"n": 1, "correct": 1, "accuracy": 1, "interval": [0, 1], "by_task": {}})
    config = load_config(cli.run.root / "as-given.yaml")
    page = write_report(config, cli.run).read_text()
    assert note(page) == "" and "100.0%" in page
    assert [line for line in lines(cli.run) if "out of date" in line] == []
    unknown = write_report(load_config(cli.run.root / "as-given.yaml", ["seed=9"]), cli.run).read_text()
    assert "label (seed 3 → 9)" in note(unknown) and "100.0%" in unknown


def test_secrets_that_the_run_s_own_config_hides_are_no_change(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "hosted").mkdir()
    teacher = {"kind": "remote", "name": "t", "model": "m", "base_url": "https://u:hunter22@x.org"}
    tree = load_config(cli.config).model_dump(mode="json")
    tree["label"] |= {"strategy": "vote", "quorum": 1, "teachers": [teacher]}
    cli.config = write_config(tmp_path / "hosted" / "config.yaml", tree)
    cli.run = RunDirectory(tmp_path / "hosted" / "run")
    assert cli("run")[0] == 0
    own = load_config(cli.run.root / "config.yaml")
    assert "hunter22" not in own.to_yaml() and not state_of_run(own, cli.run).outdated
    assert not any("out of date" in line for line in lines(cli.run))
    tree["label"]["teachers"] = [{**teacher, "base_url": "https://u:hunter22@y.org"}]
    other = load_config(write_config(cli.config, tree))
    assert state_of_run(other, cli.run).outdated["label"] == ("label.teachers.0.base_url has another value",)


def test_a_grid_leaves_out_results_of_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch)
    file = write_config(tmp_path / "c.yaml", tiny_config(Path("no/such/student")) | {"label": {"strategy": "random"}})

    def plan(*overrides: str) -> Plan:
        return make_plan("mask", file, overrides, tmp_path / "out", seeds=[1], only=["importance"], rates=[1, 2])

    for unit in plan().sweeps:
        unit.run.open(unit.config)
        for stage in unit.stages:
            run_stage(unit.config, unit.run, stage)
        (unit.run.metrics / "sft_validation.jsonl").parent.mkdir(exist_ok=True)
        (unit.run.metrics / "sft_validation.jsonl").write_text(json.dumps({"step": 1, "loss": unit.rate}) + "\n")
    rates = chosen_rates(plan())
    assert rates == {"importance": 1}
    (unit,) = plan().units(rates)
    unit.run.open(unit.config)
    for stage in unit.stages:
        run_stage(unit.config, unit.run, stage)
    for name in ("base", unit.config.order[-1]):
        table = pa.table({"id": ["a", "b"], "right": [True, False]})
        pq.write_table(table, unit.run.eval / f"{name}.parquet")
        (unit.run.eval / f"{name}.json").write_text("{}")
    assert "| importance | 0.01 (lowest tried) | – | 50.0%" in report(plan())
    assert chosen_rates(plan("sft.epochs=2")) == {}
    assert "50.0%" not in report(plan("sft.epochs=2"))
    assert "0 of 1 runs are evaluated" in (tmp_path / "out" / "index.html").read_text()


def test_a_run_is_done_whose_models_files_an_earlier_version_did_not_all_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tmp_path / "student"
    student.mkdir()
    for name in ("config.json", "qwen.tiktoken", "pytorch_model.bin"):
        (student / name).write_text("{}")
    cli = Cli(tmp_path, monkeypatch, str(student))
    config = load_config(cli.config)
    counted = [["config.json", hashlib.sha256(b"{}").hexdigest()]]
    manifest = cli.run.manifest()
    recorded = [entry["inputs"]["files"] for entry in manifest["stages"].values() if "inputs" in entry]
    assert sum(str(student) in files for files in recorded) > 2
    for files in recorded:
        if str(student) in files:
            assert files[str(student)] != digest(counted)
            files[str(student)] = digest(counted)
    write_json(cli.run.root / "manifest.json", manifest)

    def states() -> set[str]:
        return {found.state for found in standings(config, RunDirectory(cli.run.root)).values()}

    assert states() == {"done"}
    (student / "config.json").write_text("{ }")
    assert "changed" in states()
