"""Equal stages of a grid's runs are computed once, and what is alike runs at once."""

from __future__ import annotations

import errno
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from lorapar_ray.ablations.at_once import AT_ONCE, _equal, batches, groups_of, run_at_once, stage1_key
from lorapar_ray.ablations.description import described
from lorapar_ray.ablations.job import _run_all, _run_part
from lorapar_ray.ablations.plan import Plan, make_plan
from lorapar_ray.ablations.sharing import borrow, borrow_sums
from lorapar_ray.ablations.units import Unit
from lorapar_ray.datasets.prepare import prepare
from lorapar_ray.datasets.rows import iterate_rows
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.labeling.keys import teacher_keys
from lorapar_ray.labeling.store import VoteStore, question_key
from lorapar_ray.partition.regions import save_regions
from lorapar_ray.pipeline import PIPELINE, is_done, standings
from lorapar_ray.running import run_stage, run_together
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.together import require_one_base
from lorapar_ray.standing import inputs_of
from tests.tiny_run import ROOT, tiny_config, write_config
from tests.unit.finished_units import record_finished
from tests.unit.votes import answer

SHIPPED = ROOT / "jobs" / "configs"


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


def test_a_damaged_sibling_is_no_copy_and_stops_no_other_run(tmp_path: Path) -> None:
    plain = tiny_config(Path("student")) | {"label": {"strategy": "random"}}
    file = write_config(tmp_path / "tiny.yaml", plain)

    def plan_of() -> Plan:
        return make_plan("mask", file, [], tmp_path / "out", seeds=[1, 2, 3], only=["importance"], rates=[1])

    first, second, third = plan_of().units({})
    own = first.config.model_copy(update={"seed": 1})
    for unit in (first, second, third):
        unit.run.open(own)
    run_stage(own, first.run, "label")
    run_stage(own, second.run, "label")
    part = first.run.labels / "part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    assert not borrow(own, third.run, "label", [first.folder])
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not borrow(own, third.run, "label", [first.folder])  # of the same size
    part.write_bytes(whole)
    first.run.manifest_path.write_text("{")
    assert borrow(own, third.run, "label", [first.folder, second.folder]) and is_done(own, third.run, "label")
    failed: list[str] = []
    units = plan_of().units({})  # the other runs are still planned
    assert not units[0].finished and not borrow_sums(units[1].config, units[1].run, [first.folder])
    assert "importance" in "\n".join(described(plan_of()))
    assert not _run_part(units[0], ["label"], plan_of(), failed)
    assert "importance-1/manifest.json' is damaged" in failed[0] and failed[0].endswith("choose another --out")


def test_a_run_without_room_for_a_copy_leaves_the_others_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its part alone then fails with the same error; the others are asked to train together."""
    plan = make_plan("retention", SHIPPED / "quickstart.yaml", [], tmp_path, seeds=[1], only=["shared-0.5", "shared-1"])
    source, full = plan.units({})
    others = make_plan("retention", SHIPPED / "quickstart.yaml", [], tmp_path, seeds=[2, 3], only=["shared-1"]).units(
        {}
    )
    for unit in (source, full, *others):
        unit.run.open(unit.config)
        for name in unit.stages[: unit.stages.index("sft") + (unit is source)]:
            entries = unit.run.manifest()["stages"]
            inputs = inputs_of(PIPELINE[name], unit.config, entries, unit.run.fingerprints)
            unit.run.record(name, status="done", inputs=inputs, outputs=f"of {name} {unit.seed}")
    for name in ("a", "b"):
        (source.folder / "sft" / "adapter").mkdir(parents=True, exist_ok=True)
        (source.folder / "sft" / "adapter" / name).write_text(name)
    copied = shutil.copy2

    def no_room(file: Any, *rest: Any, **options: Any) -> Any:
        if str(file).endswith("b"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return copied(file, *rest, **options)

    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, no_room, False, False))
    with pytest.raises(UserError, match=r"no space left on the disk of .*shared-1-1"):
        borrow(full.config, full.run, "sft", [source.folder])
    assert not (full.folder / "sft").exists() and not (full.folder / "work" / "copies").exists()
    asked: list[int] = []
    monkeypatch.setattr(
        "lorapar_ray.ablations.at_once.run_together",
        lambda stage, members, *_: asked.extend(config.seed for config, _ in members),
    )
    run_at_once([full, *others], "sft", [source.folder])
    assert asked == [2, 3]
    shown = capsys.readouterr().out
    assert "shared-1, seed 1: sft not together with others: no space left" in shown
    assert "sft of 2 runs at once: shared-1, seed 2; shared-1, seed 3" in shown


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
