"""Grids of arms: every arm has a config of its own, and a plan says what will run."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lorapar_ray.ablations.at_once import _WORK, run_at_once
from lorapar_ray.ablations.description import described
from lorapar_ray.ablations.grids import GRIDS
from lorapar_ray.ablations.job import _evaluate_base, _run_all, _run_part
from lorapar_ray.ablations.plan import make_plan
from lorapar_ray.ablations.units import Unit, counted, shared_keys
from lorapar_ray.cli import app
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.interrupts import Terminated
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import ROOT, lorapar_here, tiny_config, write_config
from tests.unit.finished_units import record_finished

SHIPPED = ROOT / "jobs" / "configs"


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("file", ["arithmetic.yaml", "gsm8k-llama2-7b.yaml"])
def test_every_arm_is_a_run_of_its_own(name: str, file: str, tmp_path: Path) -> None:
    grid = GRIDS[name]
    if name == "strategies" and file == "arithmetic.yaml":
        pytest.skip("its config has no teachers")
    if name == "systems":
        file = "systems.yaml"
    if grid.lines:
        file = "quickstart.yaml"
    plan = make_plan(name, SHIPPED / file, [], tmp_path, seeds=[1], validation=0.25)
    units = plan.units({})
    voted = file in ("gsm8k-llama2-7b.yaml", "quickstart.yaml")
    assert len(units) == len(plan.arms) == sum((voted or not arm.votes) and arm.needs <= 3 for arm in grid.arms)
    assert len({json.dumps(shared_keys(unit), sort_keys=True) for unit in units}) == len(units)
    assert {claim.better for claim in grid.claims} | {claim.worse for claim in grid.claims} <= {
        a.name for a in grid.arms
    }
    assert len(plan.sweeps) == (5 * len(plan.arms) if grid.tuned else 0)
    assert {unit.config.sft.validation for unit in plan.sweeps} <= {0.25}
    trained = units[1].config.trained if grid.every_stage else units[1].config.order[-1:]
    assert units[0].config.evaluated[0] == "base" and units[1].config.evaluated == trained
    shown = "\n".join(described(plan))
    assert all(arm.name in shown for arm in plan.arms) and "are computed, the others are copies" in shown


def test_what_arms_share_is_counted(tmp_path: Path) -> None:
    units = make_plan("activation", SHIPPED / "gsm8k-llama2-7b.yaml", [], tmp_path, seeds=[1]).units({})
    needed = {stage: (wanted, len(computing)) for stage, wanted, computing in counted(units)}
    assert needed["label"] == needed["score"] == (9, 1)
    assert needed["partition"] == needed["grpo"] == (9, 9) and needed["sft"] == (9, 3)  # β is stage 2's alone


def cut(unit: Unit, share: float) -> None:
    """As if the unit had finished, with a mask of this share of the elements for stage 1."""
    record_finished(unit)
    write_json(unit.run.partition / "summary.json", {"total": {"shares": {"trained_stage1": share}}})


def test_a_smaller_lora_has_as_many_elements_as_the_mask_trains(tmp_path: Path) -> None:
    """Which θ alone does not say, so it is planned once that arm has cut its mask, for each seed."""
    file, both = SHIPPED / "arithmetic.yaml", ["importance", "smaller-lora"]
    with pytest.raises(UserError, match=r"--only smaller-lora: .* no importance is cut; add --only importance"):
        make_plan("mask", file, [], tmp_path, seeds=[1], only=both[1:])
    with pytest.raises(UserError, match=r"no LoRA has a lower rank than adapter\.rank 1"):
        make_plan("mask", file, ["adapter.rank=1"], tmp_path, seeds=[1])
    plan = make_plan("mask", file, [], tmp_path, seeds=[1, 2], only=both, rates=[1])
    assert [unit.waits_for for unit in plan.units({})] == ["", "", "importance", "importance"]
    cut(plan.units({})[0], 0.7)
    _, _, first, second = plan.units({})
    assert (first.waits_for, first.config.adapter.rank, first.config.adapter.alpha) == ("", 6, 12)
    assert second.waits_for == "importance" and not second.finished
    alone = make_plan("mask", file, [], tmp_path, seeds=[1], only=both[1:], rates=[1]).units({})
    assert [unit.config.adapter.rank for unit in alone] == [6]
    other = make_plan("mask", file, ["partition.theta=0.5"], tmp_path, seeds=[1], only=both, rates=[1]).units({})
    assert other[1].waits_for == "importance"  # that mask is of another θ


def test_runs_whose_size_follows_from_others_come_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["smaller-lora", "importance"]
    plan = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1, 2], only=arms, rates=[1])
    ran: list[tuple[str, int]] = []

    def finish(units: list[Unit], *_: Any) -> None:
        for unit in units:
            ran.append((unit.title, unit.config.adapter.rank))
            if unit.title != "importance, seed 2":  # it fails
                cut(unit, 0.7)

    monkeypatch.setattr("lorapar_ray.ablations.job._run_batch", finish)
    monkeypatch.setattr("lorapar_ray.ablations.job.ray_session", nullcontext)
    failed: list[str] = []
    list(_run_all(lambda: plan.units({}), plan, failed, verbose=False))
    assert "trains alone" not in capsys.readouterr().out
    assert ran == [("importance, seed 1", 8), ("importance, seed 2", 8), ("smaller-lora, seed 1", 6)]
    assert failed == [
        "smaller-lora, seed 2: has as many elements as importance trains, and that is not known: its run failed"
    ]


def test_another_plan_s_rate_gets_a_run_of_its_own(tmp_path: Path) -> None:
    """Other rates or another first seed may change the rate that a sweep chooses: the grid goes on."""
    plan = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1, 2], only=["random"])
    first, second = plan.units({"random": 2})
    record_finished(first)
    record_finished(second)
    assert [unit.folder.name for unit in (first, second)] == ["random-1", "random-2"] and second.finished
    assert [unit.folder.name for unit in plan.units({"random": 2}) if unit.finished] == ["random-1", "random-2"]
    again = plan.units({"random": 0.5})
    assert [unit.folder.name for unit in again] == ["random-1-rate-0.0005", "random-2-rate-0.0005"]
    assert not any(unit.finished for unit in again)
    for unit in plan.sweeps:
        record_finished(unit)
    assert all(unit.finished and unit.folder.name == f"random-{unit.rate:g}" for unit in plan.sweeps)
    longer = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1], only=["random"], validation=0.2)
    assert longer.sweeps[0].folder.name == "random-0.25-validation-0.2" and not longer.sweeps[0].finished


@pytest.mark.parametrize("alone", [True, False])
def test_a_finished_run_that_evaluated_other_models_is_evaluated_again(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version's was: after its last stage only. Nothing is trained again."""
    tiny = tiny_config(Path("student")) | {"label": {"strategy": "random"}, "grpo": {"steps": 1}}
    file = write_config(tmp_path / "tiny.yaml", tiny)
    plan = make_plan("activation", file, [], tmp_path / "out", seeds=[1, 2], only=["a1-b1"])
    units = plan.units({})
    for unit in units:
        unit.run.open(unit.config)
        earlier = unit.config.model_copy(
            update={"evaluate": unit.config.evaluate.model_copy(update={"models": ["grpo"]})}
        )
        record_finished(replace(unit, config=earlier))
    assert not any(unit.finished for unit in plan.units({}))
    asked: list[tuple[str, list[str]]] = []

    def evaluate(config: Any, run: RunDirectory) -> dict[str, Any]:
        asked.append((run.root.name, config.evaluated))
        return {}

    monkeypatch.setitem(PIPELINE, "evaluate", replace(PIPELINE["evaluate"], run=evaluate))
    monkeypatch.setitem(_WORK, "evaluate", lambda members: [evaluate(*member) for member in members])
    failed: list[str] = []
    if alone:
        for unit in units:
            assert _run_part(unit, unit.stages, plan, failed), failed
    else:
        run_at_once(units, "evaluate", [])
    assert failed == [] and all(unit.finished for unit in plan.units({}))
    assert asked == [("a1-b1-1", ["base", "sft", "grpo"]), ("a1-b1-2", ["sft", "grpo"])]


def test_the_base_is_evaluated_with_another_run_if_the_first_one_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_config(Path("student")) | {"label": {"strategy": "random"}}
    file = write_config(tmp_path / "tiny.yaml", tiny)
    plan = make_plan("mask", file, [], tmp_path / "out", seeds=[1, 2, 3], only=["importance"], rates=[1])
    for unit in plan.units({})[1:]:  # the first one fails
        unit.run.open(unit.config)
        record_finished(unit)
    asked: list[tuple[str, list[str]]] = []

    def evaluate(config: Any, run: RunDirectory) -> dict[str, Any]:
        asked.append((run.root.name, config.evaluated))
        return {}

    monkeypatch.setitem(PIPELINE, "evaluate", replace(PIPELINE["evaluate"], run=evaluate))
    monkeypatch.setattr("lorapar_ray.ablations.job.ray_session", lambda verbose: nullcontext())
    failed: list[str] = []
    _evaluate_base(plan, {}, failed, verbose=False)
    assert failed == [] and asked == [("importance-2", ["base", "sft"])]
    assert [unit.finished for unit in plan.units({})] == [False, True, True]
    _evaluate_base(plan, {}, failed, verbose=False)
    assert len(asked) == 1


def test_a_student_that_does_not_fit_names_the_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_config(tmp_path / "tiny.yaml", tiny_config(Path("student")) | {"label": {"strategy": "random"}})
    plan = make_plan("mask", file, [], tmp_path / "out", seeds=[1], only=["random"], rates=[1])

    def refuse(config: Any) -> None:
        raise UserError("sft.sequence_parallel: 3 does not divide the student's heads")

    monkeypatch.setitem(PIPELINE, "sft", replace(PIPELINE["sft"], check_there=refuse))
    monkeypatch.setattr("lorapar_ray.ablations.job.ray_session", lambda verbose: nullcontext())
    with pytest.raises(UserError, match=r"^arm random: sft\.sequence_parallel: 3 does not"):
        list(_run_all(lambda: plan.units({}), plan, [], verbose=False))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"grid": "maks"}, "unknown grid 'maks'; known are strategies"),
        ({"only": ["randm"]}, "no such arm of 'mask'"),
        ({"validation": 0}, "--validation 0: give a share of the training rows between 0 and 1, such as 0.1"),
        ({"only": ["shuffled-labels"]}, "needs teachers that vote, and label.strategy is random"),
        ({"seeds": [1, 1]}, "--seeds: give different"),
        ({"rates": [0.5, 1, 1]}, "--rates: give different numbers above 0, such as 0.5,1,2"),
        ({"rates": [0, 1]}, "--rates: give different numbers above 0"),
        ({"overrides": ["order=[sft]"]}, "--set order: the grid 'mask' sets it itself"),
        ({"overrides": ["sft.masked=false"]}, r"arm importance: .* cuts none for stage 1; set sft\.masked: true and"),
        ({"overrides": ["partition.regions=own"], "only": ["importance", "full-lora"]}, "arm importance: .* cuts none"),
    ],
)
def test_bad_input_is_one_line(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {"grid": "mask", "seeds": [1], **arguments}
    with pytest.raises(UserError, match=said):
        make_plan(given.pop("grid"), SHIPPED / "arithmetic.yaml", given.pop("overrides", []), tmp_path, **given)


def test_one_rate_is_every_arms(tmp_path: Path) -> None:
    plan = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1], rates=[0.5])
    usual = load_config(SHIPPED / "arithmetic.yaml", []).sft.learning_rate
    assert plan.help == "stage 1 by mask, all at one learning rate"
    assert "its own learning rate" not in "\n".join([*described(plan), *(each.text for each in plan.claims)])
    swept = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1])
    assert all(each.text.endswith(", each at its own learning rate") for each in swept.claims)
    assert next(described(swept)).startswith("mask: stage 1 by mask, each at its own learning rate; ")
    assert {unit.config.sft.learning_rate for unit in plan.units({})} == {usual / 2} and plan.sweeps == []
    with pytest.raises(UserError, match=r"--rates: the grid 'order' has no sweep; set sft\.learning_rate with --set"):
        make_plan("order", SHIPPED / "arithmetic-grpo.yaml", [], tmp_path, seeds=[1], rates=[0.5])


def test_the_run_that_evaluated_the_base_keeps_it(tmp_path: Path) -> None:
    """With more seeds or arms another run comes first."""
    file = SHIPPED / "arithmetic.yaml"
    (first,) = make_plan("mask", file, [], tmp_path, seeds=[2], only=["random"], rates=[1]).units({})
    record_finished(first)
    units = make_plan("mask", file, [], tmp_path, seeds=[1, 2], only=["importance", "random"], rates=[1]).units({})
    with_base = [unit for unit in units if "base" in unit.config.evaluated]
    assert [unit.title for unit in with_base] == ["random, seed 2"] and with_base[0].finished


def test_every_arm_of_a_mask_starts_from_the_same_adapter(tmp_path: Path) -> None:
    """Only a scored run is warmed up, so a control that trains every element has a mask that keeps all."""
    for grid in ("mask", "stage1", "retention", "retention-reversed", "theta", "systems"):
        file = "systems.yaml" if grid == "systems" else "quickstart.yaml"
        units = make_plan(grid, SHIPPED / file, [], tmp_path, seeds=[1]).units({})
        assert all(unit.config.warms_up for unit in units if unit.config.adapter.init == "default"), grid


def test_the_strategies_ask_the_teachers_of_table_1(tmp_path: Path) -> None:
    def asked(*overrides: str) -> dict[str, list[str]]:
        plan = make_plan("strategies", SHIPPED / "quickstart.yaml", overrides, tmp_path, seeds=[1])
        return {unit.arm: [each.name for each in unit.config.label.teachers] for unit in plan.units({})}

    found = asked()
    assert found["single"] == found["single-role-play"] == ["smollm2-chat"]
    assert found["second-role-play"] == ["gemma3"]  # the second has the engine of the first
    assert found["vote"] == ["smollm2-chat", "smollm2-plain", "gemma3"] and "vote-5" not in found
    own = [f"{{name: t{n}, kind: python, model: 'lorapar_ray.labeling.simulated:SimulatedTeacher'}}" for n in range(6)]
    found = asked(f"label.teachers=[{', '.join(own)}]", "label.calibration=none")
    assert found["second-role-play"] == ["t1"] and found["vote"] == ["t0", "t1", "t2"]
    assert found["vote-5"] == ["t0", "t1", "t2", "t3", "t4"]
    with pytest.raises(UserError, match=r"--only vote-5: needs 5 teachers .*, and label.teachers has 3"):
        make_plan("strategies", SHIPPED / "quickstart.yaml", [], tmp_path, seeds=[1], only=["vote-5"])


def test_methods_without_rl_train_on_all_questions(tmp_path: Path) -> None:
    for grid in ("methods", "peft"):
        units = make_plan(grid, SHIPPED / "gsm8k-llama2-7b.yaml", [], tmp_path, seeds=[1]).units({})
        for unit in units:
            assert unit.config.sft.systems == ([1, 2] if unit.config.order == ["sft"] else [1]), unit.title
    units = make_plan("methods", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1]).units({})
    assert {unit.arm for unit in units if "grpo" not in unit.config.order} == {
        *("lora-1", "lora-2", "lora-plus-2", "olora-1", "olora-2", "pissa-1", "pissa-2")
    }
    units = make_plan("theta", SHIPPED / "gsm8k-llama2-7b.yaml", [], tmp_path, seeds=[1]).units({})
    assert all(unit.config.order == ["sft"] for unit in units)


@pytest.mark.parametrize("file", ["arithmetic.yaml", "quickstart.yaml", "gsm8k-llama2-7b.yaml"])
def test_compared_methods_train_for_the_epochs_that_the_paper_gives_them(file: str, tmp_path: Path) -> None:
    """An arm with RL has one epoch of SFT, so that LoRA-PAR does not win by training longer."""
    for grid in ("methods", "peft"):
        for unit in make_plan(grid, SHIPPED / file, [], tmp_path, seeds=[1]).units({}):
            two = unit.arm.endswith("-2")
            assert unit.config.sft.epochs == (2 if two else 1), unit.title
            assert two or unit.arm.endswith("-1") or unit.config.order == ["sft", "grpo"], unit.title
        with pytest.raises(UserError, match=f"--set sft.epochs: the grid '{grid}' sets it itself"):
            make_plan(grid, SHIPPED / file, ["sft.epochs=3"], tmp_path, seeds=[1])


def test_beta_decides_something_in_every_run_of_activation(tmp_path: Path) -> None:
    """Also on a config of stage 1 alone, where three arms were the same run."""
    units = make_plan("activation", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1]).units({})
    assert {tuple(unit.config.order) for unit in units} == {("sft", "grpo")}
    assert len({shared_keys(unit)["grpo"] for unit in units}) == len(units) == 9


@pytest.mark.parametrize(
    ("grid", "file", "said"),
    [
        (
            "mask",
            "arithmetic",
            ["smaller-lora           order=[sft] partition.alpha=1 partition.theta=1 a rank with as"],
        ),
        ("theta", "gsm8k-llama2-7b", ["an optimiser step for every 32 rows, 1 epoch; on 2 GPUs"]),
        ("methods", "gsm8k-llama2-7b", ["every 32 rows, 1 or 2 epochs; on 2 GPUs", "every 8 rows, 1 epoch; on 4 GPUs"]),
        ("retention", "quickstart", ["grpo       12 of 12 are computed, the others are copies; at most 120 optimiser"]),
        ("systems", "systems", ["sft        4 of 4 are computed, the others are copies; at most 520 optimiser steps"]),
    ],
)
def test_a_dry_run_says_how_much_a_grid_would_train(grid: str, file: str, said: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["ablate", grid, str(SHIPPED / f"{file}.yaml"), "--seeds", "1", "--out", str(out), "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and not out.exists()
    assert all(line in shown.stdout for line in said), shown.stdout
    first, sweep = {"mask": ("importance", " --rates 1"), "theta": ("qkv-0.1", "")}.get(grid, ("", ""))
    one = f"before a first run has finished in this directory; one gives them: --only {first}"
    assert one in shown.stdout and (not first or f"{one} --seeds 1{sweep}\n" in shown.stdout)


def test_a_dry_run_counts_what_is_known_by_now(tmp_path: Path) -> None:
    """The rows that are labelled, and the time that finished stages took."""
    command = ["ablate", "order", str(SHIPPED / "gsm8k-llama2-7b.yaml"), "--seeds", "1", "--out", str(tmp_path)]
    for unit in make_plan("order", SHIPPED / "gsm8k-llama2-7b.yaml", [], tmp_path, seeds=[1]).units({}):
        record_finished(unit)
        for stage, seconds in {"sft": 1800.0, "grpo": 7200.0}.items():
            unit.run.record(stage, **unit.run.entry(stage) | {"seconds": seconds})
        unit.run.labels.mkdir()
        pq.write_table(pa.table({"system": [1] * 100 + [2] * 41}), unit.run.labels / "part-00000.parquet")
    shown = CliRunner().invoke(app, [*command, "--dry-run"]).stdout
    assert "at most 8 optimiser steps in all; on 2 GPUs, about 1800 s each" in shown  # 100 rows, 32 a step, twice
    assert "at most 12 optimiser steps in all; on 4 GPUs, about 7200 s each" in shown
    assert "about 5.0 hours in all, 18.0 GPU-hours, what is finished included; without" in shown


def test_systems_are_refused_where_the_rows_have_none(tmp_path: Path) -> None:
    command = ["ablate", "systems", str(SHIPPED / "gsm8k-llama2-7b.yaml"), "--out", str(tmp_path), "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert isinstance(shown.exception, UserError) and "sequence: needs several Systems" in str(shown.exception)


@pytest.mark.parametrize(
    ("grid", "file", "options", "claims"),
    [
        ("mask", "quickstart", {}, 8),
        ("mask", "arithmetic", {"only": ["importance", "random", "magnitude"]}, 2),
        ("activation", "quickstart", {}, 11),
        ("retention", "quickstart", {}, 3),
        ("retention", "quickstart", {"only": ["disjoint-1", "random-0.5", "random-1"]}, 1),
        ("systems", "systems", {}, 5),
    ],
)
def test_a_plan_counts_its_claims_before_it_has_results(
    grid: str, file: str, options: dict[str, Any], claims: int, tmp_path: Path
) -> None:
    plan = make_plan(grid, SHIPPED / f"{file}.yaml", [], tmp_path, seeds=[1, 2, 3], **options)
    assert plan.comparisons == claims
    shown = "\n".join(described(plan))
    assert shown.count("decides whether") == claims
    assert (f"decides each of {claims} claims by its" in shown) == (claims > 1)


def test_an_interrupted_grid_says_how_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Terminated

    monkeypatch.setattr("lorapar_ray.ablations.job.run_plan", interrupted)
    done = lorapar_here("ablate", "mask", SHIPPED / "arithmetic.yaml", "--out", tmp_path)
    assert done.returncode == 143
    assert done.stderr == "lorapar: interrupted; the same command continues where it stopped\n"
