"""Grids of arms: every arm has its own config, equal stages are computed once, and verdicts follow from the answers."""

from __future__ import annotations

import csv
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lorapar_ray.ablations.at_once import _WORK, AT_ONCE, _equal, batches, groups_of, run_at_once, stage1_key
from lorapar_ray.ablations.charts import losses
from lorapar_ray.ablations.description import described
from lorapar_ray.ablations.grid import Claim, sentence
from lorapar_ray.ablations.grids import GRIDS
from lorapar_ray.ablations.job import _run_all, _run_part
from lorapar_ray.ablations.plan import Plan, make_plan
from lorapar_ray.ablations.report import chosen_rates, report
from lorapar_ray.ablations.results import Outcome, decide, sum_up, summarise
from lorapar_ray.ablations.sharing import borrow, borrow_sums
from lorapar_ray.ablations.units import Unit, counted, shared_keys
from lorapar_ray.ablations.verdicts import effect, mean_interval, question_reach
from lorapar_ray.cli import app
from lorapar_ray.config_file import load_config
from lorapar_ray.datasets.prepare import prepare
from lorapar_ray.datasets.rows import iterate_rows
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.interrupts import Terminated
from lorapar_ray.labeling.keys import teacher_keys
from lorapar_ray.labeling.store import VoteStore, question_key
from lorapar_ray.partition.regions import save_regions
from lorapar_ray.pipeline import PIPELINE, is_done, run_stage, run_together, standings
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.together import require_one_base
from lorapar_ray.standing import inputs_of
from tests.tiny_run import ROOT, lorapar_here, tiny_config, write_config
from tests.unit.finished_units import record_finished
from tests.unit.votes import answer

SHIPPED = ROOT / "jobs" / "configs"
CLAIM = Claim("the first beats the second", "first", "second")


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


def test_a_run_that_cannot_share_a_base_says_so_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan("peft", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1], only=["ia3-1", "lora-1"])
    monkeypatch.setattr("lorapar_ray.ablations.job._run_batch", lambda units, *_: [record_finished(u) for u in units])
    monkeypatch.setattr("lorapar_ray.ablations.job.ray_session", nullcontext)
    list(_run_all(lambda: plan.units({}), plan, [], verbose=False))
    shown = capsys.readouterr().out
    assert "stage 1 of ia3-1 trains alone: adapter.method: ia3" in shown
    assert "stage 1 of lora-1 trains alone: no other run has its rank, targets and batches" in shown
    list(_run_all(lambda: plan.units({}), plan, [], verbose=False))
    assert capsys.readouterr().out == ""  # nothing is left to run


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


def test_a_run_of_other_settings_says_how_to_go_on_with_a_grid(tmp_path: Path) -> None:
    """This command has neither --redo nor --run-dir."""
    tiny = tiny_config(Path("student")) | {"label": {"strategy": "random"}}

    def reasons_of(**changes: Any) -> list[str]:
        file = write_config(tmp_path / "tiny.yaml", tiny | changes)
        plan = make_plan("mask", file, [], tmp_path / "out", seeds=[1], only=["random"], rates=[1])
        return reasons(plan.units({})[0], plan)

    assert reasons_of() == []
    (other,) = reasons_of(label={"strategy": "random", "definitions": {1: "quick", 2: "slow"}})
    assert "label: has results of other inputs (label.definitions.1" in other
    assert other.endswith(f"remove '{tmp_path}/out/random-1' to train it again, or choose another --out")
    (other,) = reasons_of(name="another")
    assert "choose another --out" in other and "--run-dir" not in other


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


def test_a_stage_of_equal_inputs_is_copied(tmp_path: Path) -> None:
    plain = tiny_config(Path("student")) | {"label": {"strategy": "random"}}
    file = write_config(tmp_path / "tiny.yaml", plain)
    plan = make_plan("mask", file, [], tmp_path / "out", seeds=[1, 2], only=["importance", "random"], rates=[1])
    first, other, second, _ = plan.units({})
    first.run.open(first.config)
    run_stage(first.config, first.run, "label")
    for unit, same in ((second, True), (other, False)):
        unit.run.open(unit.config)
        assert borrow(unit.config, unit.run, "label", [first.folder]) is same
        assert is_done(unit.config, unit.run, "label") is same
    copied = {path.name: path.read_bytes() for path in second.run.labels.iterdir()}
    assert copied == {path.name: path.read_bytes() for path in first.run.labels.iterdir()}


def test_another_criterion_uses_the_same_sums(tmp_path: Path) -> None:
    file = write_config(tmp_path / "tiny.yaml", tiny_config(Path("student")) | {"label": {"strategy": "random"}})
    plan = make_plan("mask", file, [], tmp_path / "out", seeds=[1], only=["importance", "magnitude", "full-lora"])
    first, other, plain = plan.units({})
    for unit in (first, other, plain):
        unit.run.open(unit.config)
        run_stage(unit.config, unit.run, "label")
    inputs = inputs_of(PIPELINE["score"], first.config, first.run.manifest()["stages"], first.run.fingerprints)
    for place in ("adapter/adapter_model.safetensors", "scores/system1.safetensors", "work/score/sums-a/1.safetensors"):
        (first.folder / place).parent.mkdir(parents=True, exist_ok=True)
        (first.folder / place).write_text("a")
    siblings = [first.folder, other.folder]
    assert not borrow_sums(other.config, other.run, siblings)  # it has not finished
    first.run.record("score", status="done", inputs=inputs)
    changed = other.config.model_copy(update={"score": other.config.score.model_copy(update={"max_length": 99})})
    assert not borrow_sums(changed, other.run, siblings)
    assert borrow_sums(other.config, other.run, siblings)
    assert other.run.entry("score")["status"] == "started"
    assert standings(other.config, other.run)["score"].state == "unfinished"
    assert (other.folder / "work/score/sums-a/1.safetensors").is_file() and (other.folder / "adapter").is_dir()
    assert not (other.folder / "scores").exists()


def test_a_stage_of_several_runs_is_recorded_in_each_as_if_it_had_run_alone(tmp_path: Path) -> None:
    file = write_config(tmp_path / "tiny.yaml", tiny_config(Path("student")) | {"label": {"strategy": "random"}})
    plan = make_plan("mask", file, [], tmp_path / "out", seeds=[1, 2, 3], only=["importance"], rates=[1])
    *together, alone = [(unit.config, unit.run) for unit in plan.units({})]
    for config, run in (*together, alone):
        run.open(config)

    def cut_off(members: list[Any]) -> list[dict[str, Any]]:
        PIPELINE["label"].run(*members[0])
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        run_together("label", together, cut_off)
    assert [run.entry("label")["status"] for _, run in together] == ["started", "started"]
    assert not any((run.root / "lock.json").exists() for _, run in together)
    asked: list[int] = []

    def work(members: list[Any]) -> list[dict[str, Any]]:
        asked.append(len(members))
        return [PIPELINE["label"].run(*member) for member in members]

    run_stage(*together[1], "label")  # one continues alone, the others together
    run_together("label", [*together, alone], work)
    run_together("label", [*together, alone], work)
    assert asked == [2]
    assert all(is_done(config, run, "label") for config, run in (*together, alone))
    entries = [run.entry("label") for _, run in (together[0], together[1])]
    assert entries[0].keys() == entries[1].keys() and entries[0]["labelled"] > 0


def test_runs_of_one_shape_train_at_once(tmp_path: Path) -> None:
    def sizes(grid: str, *overrides: str, **options: Any) -> list[list[str]]:
        plan = make_plan(
            grid, SHIPPED / "arithmetic.yaml", overrides, tmp_path, **{"seeds": [1], "rates": [1], **options}
        )
        made = batches(plan.units({}))
        assert [unit.title for group in made for unit in group] != []
        return [[unit.arm for unit in group] for group in made]

    mask = ["importance", "random", "magnitude", "first-order", "swapped", "smaller-lora", "full-lora"]
    assert sizes("mask", "sft.arms_at_once=6") == [[*mask[:5], mask[6]], [mask[5]]]
    assert sizes("mask", "sft.arms_at_once=4") == [mask[:3], [*mask[3:5], mask[6]], [mask[5]]]
    assert sizes("mask", "sft.arms_at_once=1") == [[name] for name in mask]
    assert sizes("mask", seeds=[1, 2], only=["random"]) == [["random", "random"]]
    assert sizes("mask", "sft.sharding=fsdp2", only=["random", "swapped"]) == [["random"], ["swapped"]]
    theta = make_plan("mask", SHIPPED / "arithmetic.yaml", ["partition.theta=0.5"], tmp_path, seeds=[1]).units({})
    whole = {"smaller-lora": 1, "full-lora": 1}
    assert {unit.arm: unit.config.partition.theta for unit in theta} == dict.fromkeys(mask, 0.5) | whole
    lora, pissa = ["lora", "lora-par", "random-mask"], ["pissa", "lora-par-pissa", "random-mask-pissa"]
    assert sizes("stage1") == [lora, pissa]
    assert sizes("stage1", "sft.sharding=fsdp2") == [[name] for name in (*lora, *pissa)]
    own = make_plan("activation", SHIPPED / "arithmetic.yaml", ["sft.arms_at_once=2"], tmp_path, seeds=[1, 2])
    made = batches(own.units({}))  # β is not stage 1's: three stages 1 for each seed, each of three runs
    assert [len(group) for group in made] == [6, 6, 6]
    assert [len({stage1_key(unit) for unit in group}) for group in made] == [2, 2, 2]
    shown = "\n".join(described(own))
    assert "stage 1 of 6 runs trains together, up to 2 adapters on one frozen base" in shown
    assert "sft        6 of 18 are computed" in shown
    plan = make_plan("peft", SHIPPED / "arithmetic.yaml", [], tmp_path, seeds=[1, 2])
    shown = "\n".join(described(plan))
    assert "stage 1 of 8 runs trains together, up to 2 adapters on one frozen base" in shown
    assert "stage 1 of ia3-1 trains alone: adapter.method: ia3" in shown and "of lora-1 trains" not in shown


def test_stage_2_of_runs_of_one_shape_trains_at_once(tmp_path: Path) -> None:
    def grid(name: str, *overrides: str) -> tuple[list[list[str]], str]:
        if not any("grpo.arms_at_once" in each for each in overrides):
            overrides = ("grpo.arms_at_once=4", *overrides)
        plan = make_plan(name, SHIPPED / "arithmetic-grpo.yaml", overrides, tmp_path, seeds=[1], only=[])
        made = [group for batch in batches(plan.units({})) for group in groups_of(batch, "grpo")]
        return [[unit.arm for unit in group] for group in made], "\n".join(described(plan))

    found, shown = grid("order")
    assert found == [["sft-grpo", "grpo-sft"]]
    assert "stage 2 trains up to 2 of these together" in shown and "alone" not in shown
    found, _ = grid("activation", "sft.arms_at_once=9")
    assert [len(group) for group in found] == [3, 3, 3]
    found, _ = grid("activation", "sft.arms_at_once=9", "grpo.arms_at_once=9")
    assert [len(group) for group in found] == [9]
    for change in ("grpo.sync=merged", "grpo.sharding=fsdp2"):
        found, shown = grid("order", change)
        assert found == [] and f"stage 2 of sft-grpo trains alone: {change.replace('=', ': ')}" in shown


def test_parts_follow_the_runs_own_order(tmp_path: Path) -> None:
    plan = make_plan("order", SHIPPED / "arithmetic-grpo.yaml", [], tmp_path, seeds=[1])
    first, second = (unit.parts(AT_ONCE) for unit in plan.units({}))
    assert first == [["label", "score", "partition"], ["sft"], ["grpo"], ["evaluate"]]
    assert second == [["label", "score", "partition"], ["grpo"], ["sft"], ["evaluate"]]
    assert plan.units({})[0].parts(()) == [["label", "score", "partition", "sft", "grpo", "evaluate"]]


def test_runs_of_a_failed_group_continue_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path / "tiny.yaml", tiny_config(Path("student")) | {"label": {"strategy": "random"}})
    plan = make_plan("mask", file, [], tmp_path / "out", seeds=[1, 2], only=["importance"], rates=[1])
    units = plan.units({})
    for unit in units:
        unit.run.open(unit.config)
    run_at_once(units, "sft", [])  # nothing before it has run
    shown = capsys.readouterr().out
    assert "sft of 2 runs at once" in shown and "not together, but one after the other: sft: stage 'label'" in shown
    assert not any(unit.run.entry("sft") for unit in units)
    asked: list[str] = []

    def defect(config: Any, run: RunDirectory, name: str, redo: str) -> None:
        asked.append(run.root.name)
        if run.root.name == "importance-1":
            raise RuntimeError("a defect")

    monkeypatch.setattr("lorapar_ray.ablations.job.run_stage", defect)
    failed = [line for unit in units for line in reasons(unit, plan)]
    assert asked == ["importance-1", "importance-2"]
    assert len(failed) == 1 and failed[0].startswith("importance, seed 1: RuntimeError: a defect (the full error is in")
    assert "Traceback" in (plan.out / "failures" / "importance-1.txt").read_text()


def reasons(unit: Unit, plan: Plan) -> list[str]:
    failed: list[str] = []
    assert _run_part(unit, ["label"], plan, failed) is not bool(failed)
    return failed


def test_residual_bases_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    runs = [RunDirectory(tmp_path / name) for name in "abc"]
    for number, run in enumerate(runs):
        base = run.adapter / "base"
        base.mkdir(parents=True)
        (base / "model.safetensors").write_bytes(b"same" if number < 2 else b"other")
    bases = [(run, str(run.adapter / "base")) for run in runs]
    require_one_base(bases[:2])
    with pytest.raises(UserError, match="residual bases of these runs differ"):
        require_one_base(bases)
    require_one_base([(runs[0], "package:x"), (runs[2], "package:x")])


def test_shuffled_labels_permute_the_votes_without_new_requests(tmp_path: Path) -> None:
    teacher = {"name": "a", "kind": "python", "model": "lorapar_ray.labeling.simulated:SimulatedTeacher"}
    voting = {"teachers": [teacher], "calibration": "none"}
    file = write_config(tmp_path / "tiny.yaml", tiny_config(Path("student")) | {"label": voting})
    arms = ["importance", "shuffled-labels"]
    plan = make_plan("mask", file, [], tmp_path / "out", seeds=[1], only=arms, rates=[1])
    found = []
    for unit in plan.units({}):
        config, run = unit.config, unit.run
        run.open(config)
        if not found:  # one teacher's answers to all questions: no teacher has to start
            other = RunDirectory(tmp_path / "other")
            prepare(config, other)
            (keys,) = teacher_keys(config.label, config.label.teachers[0], "student", run.fingerprints)
            store, rows = VoteStore(Path(config.label.cache or "")), list(iterate_rows(other.data / "train.parquet"))
            store.add(
                (question_key(r.prompt, r.answer), keys, answer(1.0 if n % 3 else -1.0)) for n, r in enumerate(rows)
            )
            store.close()
        run_stage(config, run, "label")
        found.append(pq.read_table(run.labels / "part-00000.parquet").to_pylist())
    voted, dealt = found
    assert len(voted) == len(dealt) > 10
    assert [row["id"] for row in voted] == [row["id"] for row in dealt]
    assert [row["votes"] for row in voted] == [row["votes"] for row in dealt]
    own, drawn = ([row["system"] for row in rows] for rows in (voted, dealt))
    assert own != drawn and sorted(own) == sorted(drawn) and set(own) == {1, 2}
    assert own == [row["votes"][0]["system"] for row in voted]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"grid": "maks"}, "unknown grid 'maks'; known are strategies"),
        ({"only": ["randm"]}, "no such arm of 'mask'"),
        ({"validation": 0}, "--validation 0: give a share of the training rows between 0 and 1, such as 0.1"),
        ({"only": ["shuffled-labels"]}, "needs teachers that vote, and label.strategy is random"),
        ({"seeds": [1, 1]}, "--seeds: give different"),
        ({"overrides": ["order=[sft]"]}, "--set order: the grid 'mask' sets it itself"),
        ({"overrides": ["sft.masked=false"]}, r"arm importance: .* cuts none for stage 1; set sft\.masked: true and"),
        ({"overrides": ["partition.regions=own"], "only": ["importance", "full-lora"]}, "arm importance: .* cuts none"),
    ],
)
def test_bad_input_is_one_line(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {"grid": "mask", "seeds": [1], **arguments}
    with pytest.raises(UserError, match=said):
        make_plan(given.pop("grid"), SHIPPED / "arithmetic.yaml", given.pop("overrides", []), tmp_path, **given)


def outcomes(*right: int, n: int = 200) -> list[Outcome]:
    return [Outcome(seed, {str(q): q < count for q in range(n)}, 1e-3, 0.4) for seed, count in enumerate(right)]


def test_a_claim_is_held_not_held_or_undecided() -> None:
    held = decide(CLAIM, outcomes(120, 124, 122), outcomes(90, 91, 95))
    assert held is not None and held.found == "held" and held.effect.seeds == 3 and held.effect.questions == 200
    assert held.effect.difference == pytest.approx((30 + 33 + 27) / 600)
    assert "a difference of +15.0 points" in held.sentence and held.sentence.endswith("so the claim held here.")
    assert "over 3 seeds and n = 200 questions; exact sign test over questions, p = " in held.sentence
    reverse = decide(CLAIM, outcomes(90, 91, 95), outcomes(120, 124, 122))
    assert reverse is not None and reverse.found == "not held"
    same = outcomes(*[500] * 3, n=1000)
    equal = decide(CLAIM, same, same)
    assert equal is not None and equal.found == "not held" and equal.p == 1
    assert equal.sentence.endswith("a difference within 1 point counts as none, so the claim did not hold here.")
    reached = decide(replace(CLAIM, reaches=True), same, same)
    assert reached is not None and reached.found == "held"
    assert reached.sentence.endswith("less than 1 point below counts as reached, so the claim held here.")
    noisy = decide(CLAIM, outcomes(120, 80, 110), outcomes(90, 100, 95))
    assert noisy is not None and noisy.found == "undecided" and "is undecided" in noisy.sentence
    assert decide(CLAIM, outcomes(120), []) is None


def test_a_claim_about_several_pairs_holds_if_it_holds_for_each() -> None:
    lines = [replace(CLAIM, worse=name) for name in ("second", "third", "fourth")]
    alone = Claim("another", "first", "second")
    held, noisy, higher = outcomes(*[700] * 3, n=1000), outcomes(690, 650, 720, n=1000), outcomes(*[800] * 3, n=1000)

    def whole(*others: list[Outcome]) -> tuple[str, str]:
        found = [decide(line, held, other) for line, other in zip(lines, others, strict=False)]
        [overall] = sum_up([*lines, alone], [each for each in found if each is not None])
        return overall.found, overall.sentence

    low = outcomes(*[500] * 3, n=1000)
    assert whole(low, low, low) == (
        "held",
        "The first beats the second, in each of 3 comparisons: 3 held, so the claim held here.",
    )
    assert whole(low, low)[0] == "undecided" and "2 held, 1 not finished, so it is undecided." in whole(low, low)[1]
    assert whole(low, noisy, low)[0] == "undecided"
    assert whole(low, higher)[0] == "not held" and "1 held, 1 did not hold, 1 not finished" in whole(low, higher)[1]
    assert sum_up([*lines, alone], []) == []
    texts = [each.text for name in ("activation", "theta") for each in GRIDS[name].claims]
    assert sorted(texts.count(text) for text in set(texts)) == [1, 8, 9]


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_decide_nothing_about_arms(seeds: int) -> None:
    few = decide(CLAIM, outcomes(*[120] * seeds), outcomes(*[90] * seeds))
    assert few is not None and few.found == "undecided" and few.effect.interval[0] > 0.05
    assert f"over n = 200 questions of {'one seed' if seeds == 1 else '2 seeds'}" in few.sentence
    assert few.sentence.endswith("so it is undecided (a verdict needs 3 seeds).")


def test_seeds_that_agree_on_one_question_of_a_hundred_decide_nothing() -> None:
    """The spread between seeds is 0 then, but another question would have been another difference."""
    three = decide(CLAIM, outcomes(51, 51, 51, n=100), outcomes(50, 50, 50, n=100))
    assert three is not None and three.p == 1 and three.found == "undecided"
    low, high = three.effect.interval
    assert low < -0.01 and high > 0.03
    for some in (1, 2, 3, 20):  # however few questions there are, the same answers do not make two arms equal
        same = decide(replace(CLAIM, reaches=True), outcomes(*[1] * 3, n=some), outcomes(*[1] * 3, n=some))
        assert same is not None and same.found == "undecided"


def test_an_interval_is_wider_than_that_over_seeds_and_that_over_questions() -> None:
    by_seed, by_question = [0.02, 0.05, 0.08], [1.0] * 12 + [-1.0] * 7 + [0.0] * 81
    whole, below = effect(by_seed, [by_question]), question_reach([by_question])[0]
    _, (low, high) = mean_interval(by_seed)
    assert whole.difference == pytest.approx(0.05) and whole.questions == 100
    assert whole.interval[0] == pytest.approx(0.05 - ((0.05 - low) ** 2 + below**2) ** 0.5)
    assert whole.interval[0] < min(low, 0.05 - below) and whole.interval[1] > high


def test_the_interval_over_questions_is_bonett_and_prices() -> None:
    """Of 12 questions gained and 7 lost of 100: (13 − 8) / 102 ± z · √((13 + 8 − 5² / 102) / 102²)."""
    below, above = question_reach([[1.0] * 12 + [-1.0] * 7 + [0.0] * 81])
    reach = 1.959964 * (21 - 25 / 102) ** 0.5 / 102
    assert (0.05 - below, 0.05 + above) == pytest.approx((5 / 102 - reach, 5 / 102 + reach))
    values = [1.0] * 120 + [-1.0] * 70 + [0.0] * 810
    apart = question_reach([[each / 2 for each in values]] * 2)[0]  # two groups, each a half of the difference
    assert apart == pytest.approx(question_reach([values])[0] / 2**0.5, rel=0.01)


def test_an_interval_ends_at_the_largest_possible_difference() -> None:
    most = decide(CLAIM, outcomes(*[3] * 3, n=3), outcomes(0, 0, 0, n=3))
    assert most is not None and most.effect.interval[1] == 1 and "to +100.0 over" in most.sentence
    assert effect([0.9, 1.0, 0.2]).interval[1] == 1 < effect([0.9, 1.0, 0.2], largest=2).interval[1]


def test_two_seeds_answer_the_same_questions() -> None:
    """A question counts once: n runs with the same answers say no more about questions than one does."""
    one, two = (decide(CLAIM, outcomes(*[112] * n), outcomes(*[100] * n)) for n in (1, 2))
    assert one is not None and two is not None
    assert one.p == two.p and one.effect.questions == two.effect.questions == 200 and two.effect.seeds == 2
    assert two.effect.interval == one.effect.interval
    assert "exact McNemar test, p" in one.sentence and "exact sign test over questions, p" in two.sentence
    assert summarise("arm", outcomes(100, 100)).interval == summarise("arm", outcomes(100)).interval
    tied = decide(CLAIM, outcomes(110, 100), outcomes(100, 110))
    assert tied is not None and tied.p == 1 and tied.effect.difference == 0


def test_less_than_the_margin_behind_is_not_refuted() -> None:
    """The whole interval may lie below 0 and the claim still be true."""
    whole = outcomes(*[4000] * 3, n=4000)
    close = decide(replace(CLAIM, reaches=True), outcomes(3980, 3979, 3979, n=4000), whole)
    assert close is not None and close.effect.interval[1] < 0 and close.found == "held"
    unsure = decide(replace(CLAIM, reaches=True), outcomes(990, 986, 994, n=1000), outcomes(1000, 1000, 1000, n=1000))
    assert unsure is not None and unsure.effect.interval[0] < -0.01 < unsure.effect.interval[1]
    assert unsure.found == "undecided"
    behind = decide(replace(CLAIM, reaches=True), outcomes(970, 971, 969, n=1000), outcomes(1000, 1000, 1000, n=1000))
    assert behind is not None and behind.found == "not held"


def test_a_claim_begins_its_sentence_and_a_symbol_stays_what_it_is() -> None:
    assert sentence("disjoint regions forget less") == "Disjoint regions forget less"
    assert sentence("α = β = 1 ends highest") == "α = β = 1 ends highest"


def test_the_interval_over_seeds_is_student_t() -> None:
    mean, (low, high) = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and (low, high) == pytest.approx((3 - 1.9634, 3 + 1.9634), abs=1e-3)


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
    table = list(csv.reader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row[0] for row in table] == ["arm", "base", "importance", "random"]
    assert r"52.0\% & " in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 3 and "6 of 6 runs are evaluated" in page
    assert "Stage 1 by mask, all at one learning rate." in page and "its own learning rate" not in page + text
    assert "✓ held" in page and "importance − random" in page and not re.search(r'(src|href)="(?!#)', page)
    assert "52.0% | 42.3% – 61.5% | 100 |" in text  # over the questions, each of which counts once
    report(plan, ["random, seed 1: <b>"])
    assert "random, seed 1: &lt;b&gt;" in (tmp_path / "index.html").read_text()


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
    assert "| random |" in text and "| base |" in text and "importance" not in text
    assert "3 of 6 runs are evaluated" in (tmp_path / "index.html").read_text()
    fresh = make_plan("mask", SHIPPED / "arithmetic.yaml", [], tmp_path / "fresh", seeds=[1, 2, 3], only=two)
    evaluating = [unit.title for unit in fresh.compared({"random": 1}) if "base" in unit.config.evaluated]
    assert evaluating == ["random, seed 1"]
    assert report(fresh).count("\n") == 2  # nothing is finished


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


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_training_stage_that_a_sibling_has_finished_is_copied(stage: str, tmp_path: Path) -> None:
    """Also if the runs that need it are in another batch."""
    grid = {"sft": "retention", "grpo": "retention-reversed"}[stage]
    plan = make_plan(grid, SHIPPED / "quickstart.yaml", [], tmp_path, seeds=[1], only=["shared-0.5", "shared-1"])
    first, second = plan.units({})
    for unit in (first, second):
        unit.run.open(unit.config)
        for name in unit.stages[: unit.stages.index(stage) + (unit is first)]:
            entries = unit.run.manifest()["stages"]
            inputs = inputs_of(PIPELINE[name], unit.config, entries, unit.run.fingerprints)
            unit.run.record(name, status="done", inputs=inputs, outputs=f"of {name}")
    adapter = Path(stage) / "adapter" / "adapter_config.json"
    (first.folder / adapter).parent.mkdir(parents=True)
    (first.folder / adapter).write_text("{}")
    run_at_once([second], stage, [first.folder, second.folder])
    assert (second.folder / adapter).is_file() and is_done(second.config, second.run, stage)


def test_stage_1_is_copied_from_a_run_whose_cut_lets_it_train_the_same_elements(tmp_path: Path) -> None:
    """Runs that differ in β alone have other regions, but the same stage 1."""
    arms = ["a1-b0", "a1-b1", "a0-b1", "a0-b0"]
    plan = make_plan("activation", SHIPPED / "quickstart.yaml", [], tmp_path, seeds=[1], only=arms)
    units = {unit.arm: unit for unit in plan.units({})}
    for arm, trained in {"a1-b0": 4, "a1-b1": 4 | 8, "a0-b1": 8, "a0-b0": 0}.items():
        unit = units[arm]
        unit.run.open(unit.config)
        regions = {"A": torch.tensor([1, 2, 3 | trained], dtype=torch.uint8)}
        unit.run.partition.mkdir()
        save_regions(regions, unit.run.partition / "regions.safetensors", theta=0.9, alpha=1.0, beta=1.0)
        for name in ("label", "score", "partition"):
            inputs = inputs_of(PIPELINE[name], unit.config, unit.run.manifest()["stages"], unit.run.fingerprints)
            unit.run.record(name, status="done", inputs=inputs, outputs=f"of {arm}" if name == "partition" else name)
    first = units["a1-b0"]
    inputs = inputs_of(PIPELINE["sft"], first.config, first.run.manifest()["stages"], first.run.fingerprints)
    first.run.record("sft", status="done", inputs=inputs, outputs="of sft")
    (first.run.sft / "adapter").mkdir(parents=True)
    (first.run.sft / "adapter" / "adapter_config.json").write_text("{}")
    siblings = [unit.folder for unit in units.values()]
    same, other = units["a1-b1"], units["a0-b1"]
    assert not borrow(other.config, other.run, "sft", siblings)
    assert _equal(units["a0-b0"], "sft") == _equal(other, "sft") != _equal(same, "sft")  # one of them trains
    assert borrow(same.config, same.run, "sft", siblings) and is_done(same.config, same.run, "sft")
    assert (same.run.sft / "adapter" / "adapter_config.json").is_file()
    assert not borrow(same.config, same.run, "grpo", siblings)
    first.run.record("partition", **first.run.entry("partition") | {"outputs": "of another cut"})
    same.run.record("sft")
    assert not borrow(same.config, same.run, "sft", [first.folder])  # no longer the cut that its stage 1 was made with


@pytest.mark.parametrize("inputs", ["a digest", {}, None])
def test_a_sibling_of_an_earlier_format_is_no_copy_and_no_crash(inputs: Any, tmp_path: Path) -> None:
    """Manifests recorded one digest of a stage's inputs; converted ones may not know them."""
    plan = make_plan("activation", SHIPPED / "quickstart.yaml", [], tmp_path, seeds=[1], only=["a1-b0", "a1-b1"])
    earlier, own = plan.units({})
    record_finished(earlier)
    manifest = earlier.run.manifest()
    manifest["format"] = 1 if isinstance(inputs, str) else manifest["format"]
    for entry in manifest["stages"].values():
        entry["inputs"] = inputs
    write_json(earlier.run.manifest_path, manifest)
    sums = earlier.folder / "work" / "score" / "sums-a"
    sums.mkdir(parents=True)
    own.run.open(own.config)
    for name in ("label", "score", "partition", "sft", "grpo"):
        assert not borrow(own.config, own.run, name, [earlier.folder])
    assert not borrow_sums(own.config, own.run, [earlier.folder])
    assert not plan.units({})[0].finished


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


def test_a_claim_counts_no_comparison_that_the_config_does_not_allow(tmp_path: Path) -> None:
    """A vote of five needs five teachers: its line would stay unfinished for ever."""

    def arms(*overrides: str) -> set[str]:
        plan = make_plan("strategies", SHIPPED / "quickstart.yaml", overrides, tmp_path, seeds=[1], only=["vote"])
        return {name for claim in plan.claims for name in (claim.better, claim.worse)}

    own = [f"{{name: t{n}, kind: python, model: 'lorapar_ray.labeling.simulated:SimulatedTeacher'}}" for n in range(5)]
    everything = {name for claim in GRIDS["strategies"].claims for name in (claim.better, claim.worse)}
    assert arms(f"label.teachers=[{', '.join(own)}]", "label.calibration=none") == everything
    assert "vote-5" in everything and arms() == everything - {"vote-5"}


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
    assert "its hours are not known before a first run has finished in this directory" in shown.stdout


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


def test_an_interrupted_grid_says_how_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Terminated

    monkeypatch.setattr("lorapar_ray.ablations.job.run_plan", interrupted)
    done = lorapar_here("ablate", "mask", SHIPPED / "arithmetic.yaml", "--out", tmp_path)
    assert done.returncode == 143
    assert done.stderr == "lorapar: interrupted; the same command continues where it stopped\n"


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
        "a0-b0.5,30.0%,50.0%,3",
        "a0-b1,30.0%,50.0%,3",
    ]
    assert "Accuracy after each stage" in (tmp_path / "index.html").read_text()
