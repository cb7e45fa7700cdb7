"""K Systems: labels from the config, regions, training one after the other, and what is forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from lorapar_ray.ablations.description import described
from lorapar_ray.ablations.grid import Claim
from lorapar_ray.ablations.plan import make_plan
from lorapar_ray.ablations.report import report
from lorapar_ray.ablations.sequence import Course, Forgetting, compare, mean_skills, read_course
from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.datasets.labelled import evaluation_table
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.datasets.tokens import UNLABELLED, TokenTable
from lorapar_ray.errors import UserError
from lorapar_ray.importance.halves import Halves, save_halves
from lorapar_ray.partition.control import half_control
from lorapar_ray.partition.job import partition_stage
from lorapar_ray.partition.select import keep_top
from lorapar_ray.partition.systems import (
    FILE,
    count_of,
    cut_systems,
    disjoint,
    mask_of_systems,
    save_systems,
    total_importance,
)
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.preview import describe
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.arm import Worker
from lorapar_ray.sft.job import stage1_parts, train_stage1
from lorapar_ray.sft.together import shape_of, train_together
from tests.sft_run import ready_sequence, weights
from tests.tiny_run import ROOT, tiny_config
from tests.together import tasks_here
from tests.unit.finished_units import finish_sequence, record_finished
from tests.unit.partition_scores import Scores, flat, skewed

torch.set_num_threads(1)

SHIPPED = ROOT / "jobs" / "configs" / "systems.yaml"
TASKS = ("chain_sum", "letter_counting", "gcd")
DEFINITIONS = dict(enumerate(TASKS, start=1))


def sources(seed: int, rows: int) -> list[dict[str, Any]]:
    return [
        {"reader": "reasoning_gym", "task": task, "rows": rows, "seed": seed, "system": system}
        for system, task in DEFINITIONS.items()
    ]


def three_systems(**changes: Any) -> dict[str, Any]:
    """Three generated tasks, each a System; stage 1 alone."""
    return {
        **tiny_config(Path("student")),
        "order": ["sft"],
        "data": {"train": sources(1, 8), "test": sources(2, 4)},
        "label": {"strategy": "source", "definitions": DEFINITIONS},
        **changes,
    }


def test_the_label_is_the_system_of_the_source(tmp_path: Path) -> None:
    config, run = Config.model_validate(three_systems()), RunDirectory(tmp_path / "run")
    run.open(config)
    run_stage(config, run, "label")
    labelled = read_table(run.labels, {"task": str, "system": int})
    assert {row["task"]: row["system"] for row in labelled} == {task: k for k, task in DEFINITIONS.items()}
    assert {row["task"]: row["system"] for row in read_table(run.data / "test.parquet")} == {
        row["task"]: row["system"] for row in labelled
    }
    assert json.loads(run.label_summary.read_text())["split"].keys() == {"1", "2", "3"}


def test_files_of_rows_without_a_system_have_no_such_column(tmp_path: Path) -> None:
    plain = {**tiny_config(Path("student")), "label": {"strategy": "random"}}
    config, run = Config.model_validate(plain), RunDirectory(tmp_path / "run")
    run.open(config)
    run_stage(config, run, "label")
    assert "system" not in pq.read_schema(run.data / "train.parquet").names
    assert "system" not in pq.read_schema(run.data / "test.parquet").names


def test_a_system_whose_rows_are_all_test_rows_is_an_error(tmp_path: Path) -> None:
    train = sources(1, 4)
    config = Config.model_validate(three_systems(data={"train": train, "test": train[2:]}))
    run = RunDirectory(tmp_path / "run")
    run.open(config)
    with pytest.raises(UserError, match=r"no row of System 3 is left.*rejects/prepare\.parquet"):
        run_stage(config, run, "label")
    assert not list(run.labels.glob("*.parquet"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"train": sources(1, 8)[:2]}}, "data.train: no entry has system 3"),
        ({"label": {"strategy": "source", "definitions": {1: "a", 3: "b"}}}, "must be numbered 1 to K"),
        ({"label": {"strategy": "source"}}, r"data.train\[2\].system: System 3 is not in label.definitions \(1 to 2\)"),
        ({"data": {"train": [*sources(1, 8), tiny_config(Path("s"))["data"]["train"][0]]}}, r"data.train\[3\].system"),
        ({"label": {"strategy": "random", "definitions": DEFINITIONS}}, "label.strategy random does not use"),
        (
            {"label": {"strategy": "source", "definitions": DEFINITIONS, "shuffled": True}},
            "strategy source has no votes",
        ),
        (
            {"order": ["sft", "grpo"], "partition": {"regions": "own"}},
            "partition.regions: own regions are trained by SFT",
        ),
        ({"partition": {"regions": "disjoint", "mask": "swapped"}}, "mask: swapped exchanges the regions"),
    ],
)
def test_systems_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(three_systems(**changes))


def kept_sets(theta: float = 0.9) -> tuple[dict[int, Scores], dict[int, Scores]]:
    """Scores of three Systems of different scales, and what θ keeps of each."""
    scores = {system: {k: v * 10.0**system for k, v in skewed(system).items()} for system in (1, 2, 3)}
    return {system: keep_top(each, theta) for system, each in scores.items()}, scores


def test_disjoint_regions_share_out_the_union_of_the_kept_sets() -> None:
    kept, scores = kept_sets()
    masks = disjoint(kept, scores)
    regions, sets = (torch.stack([flat(each[system]) for system in (1, 2, 3)]) for each in (masks, kept))
    assert torch.equal(regions.sum(0), sets.any(0).long())
    assert not (regions & ~sets).any() and (regions.sum(1) > 0).all()


def test_an_element_goes_where_it_has_the_largest_share_whatever_the_scale_of_a_systems_losses() -> None:
    kept, scores = kept_sets()
    masks = disjoint(kept, scores)
    shares = torch.stack([flat(scores[k]).double() / total_importance(scores[k]) for k in (1, 2, 3)])
    sets = torch.stack([flat(kept[k]) for k in (1, 2, 3)])
    best = torch.where(sets, shares, -1.0).argmax(0)
    for system in (1, 2, 3):
        assert torch.equal(flat(masks[system]), sets.any(0) & (best == system - 1))
    larger = {**scores, 2: {key: value * 64 for key, value in scores[2].items()}}
    assert all(torch.equal(flat(disjoint(kept, larger)[k]), flat(masks[k])) for k in (1, 2, 3))


def test_equal_shares_go_to_the_lower_number() -> None:
    scores = {system: {"a": torch.tensor([2.0, 1.0, 1.0])} for system in (1, 2)}
    kept = {1: {"a": torch.tensor([False, True, True])}, 2: {"a": torch.tensor([True, True, False])}}
    masks = disjoint(kept, scores)
    assert masks[1]["a"].tolist() == [False, True, True] and masks[2]["a"].tolist() == [True, False, False]


@pytest.mark.parametrize("regions", ["own", "disjoint"])
def test_random_regions_have_the_sizes_of_those_of_importance(regions: Literal["own", "disjoint"]) -> None:
    _, scores = kept_sets()
    chosen, summary = cut_systems(scores, 0.9, regions=regions)
    drawn, other = cut_systems(scores, 0.9, regions=regions, random=True, seed=4)
    again, _ = cut_systems(scores, 0.9, regions=regions, random=True, seed=5)
    for system in (1, 2, 3):
        assert count_of(drawn[system]) == count_of(chosen[system]) == summary["systems"][str(system)]["elements"]
        assert not torch.equal(flat(drawn[system]), flat(chosen[system]))
        assert not torch.equal(flat(drawn[system]), flat(again[system]))
        assert other["systems"][str(system)]["importance"] < summary["systems"][str(system)]["importance"] <= 1
    overlap = torch.stack([flat(drawn[system]) for system in (1, 2, 3)]).sum(0).max()
    assert int(overlap) == (1 if regions == "disjoint" else 3)
    assert summary["jaccard"].keys() == {"1-2", "1-3", "2-3"} and summary["jaccard"] == other["jaccard"]


def test_regions_of_nine_systems_are_read_as_they_were_written(tmp_path: Path) -> None:
    scores = {system: skewed(system) for system in range(1, 10)}
    masks, _ = cut_systems(scores, 0.8, regions="own")
    save_systems(masks, tmp_path / "systems.safetensors")
    for system in masks:
        assert torch.equal(flat(mask_of_systems(tmp_path / "systems.safetensors", [system])), flat(masks[system]))
    assert torch.equal(flat(mask_of_systems(tmp_path / "systems.safetensors", [2, 9])), flat(masks[2]) | flat(masks[9]))
    save_file({"a": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold regions"):
        mask_of_systems(tmp_path / "other.safetensors", [1])


def test_the_stage_cuts_every_system(tmp_path: Path) -> None:
    config = Config.model_validate(three_systems(partition={"regions": "disjoint", "theta": 0.9}))
    run = RunDirectory(tmp_path / "run")
    run.scores.mkdir(parents=True)
    for system in (1, 2, 3):
        save_file(skewed(system), run.scores / f"system{system}.safetensors")
    halves = tuple(skewed(seed) for seed in (1, 1, 1, 2, 2, 2))
    save_halves(run.scores / "halves", [Halves((8, 8, 8), halves)])
    summary = partition_stage(config, run)
    control = summary["control"]
    assert control["1-2"]["jaccard"]["system1"] == control["2-3"]["jaccard"]["system2"] == 1
    assert control["1-3"] == half_control(*halves[:2], *halves[4:], theta=0.9, seed=3)
    assert control["1-3"]["warning"] is None and "differ no more" in control["1-2"]["warning"]
    regions = torch.stack([flat(mask_of_systems(run.partition / FILE, [k])) for k in (1, 2, 3)])
    assert [int(each) for each in regions.sum(1)] == [each["elements"] for each in summary["systems"].values()]
    assert int(regions.sum(0).max()) == 1
    assert describe(config, run).startswith("  θ 0.9, disjoint: System 1 ")
    (run.scores / "system3.safetensors").unlink()
    with pytest.raises(UserError, match="lorapar score"):
        partition_stage(config, run)


def test_the_overlap_of_two_systems_is_shown_beside_that_of_random_halves(tmp_path: Path) -> None:
    config, run = load_config(ROOT / "jobs" / "configs" / "quickstart.yaml", []), RunDirectory(tmp_path / "run")
    run.scores.mkdir(parents=True)
    for system in (1, 2):
        save_file(skewed(system), run.scores / f"system{system}.safetensors")
    save_halves(run.scores / "halves", [Halves((8, 8), tuple(skewed(seed) for seed in (1, 1, 2, 2)))])
    across = partition_stage(config, run)["overlap"]["jaccard"]
    shown = f"; Jaccard {across:.3f} (random halves of the examples: {across:.3f} across the Systems, 1.000 and 1.000"
    assert shown in describe(config, run)
    summary = json.loads((run.partition / "summary.json").read_text()) | {"control": []}  # as without examples to halve
    (run.partition / "summary.json").write_text(json.dumps(summary))
    assert describe(config, run).endswith(f"; Jaccard {across:.3f}")


def test_scores_of_more_systems_are_other_results() -> None:
    plain, cut = (Config.model_validate(three_systems(partition={"regions": each})) for each in ("stages", "own"))
    assert (plain.scored, cut.scored) == ([1, 2], [1, 2, 3])
    settings = [PIPELINE["score"].settings(each)["systems"] for each in (plain, cut)]
    assert settings == [([1, 2], True), ([1, 2, 3], False)]


SEQUENCE = {"systems": [2, 3, 1], "sequence": True}
DISJOINT = {"regions": "disjoint"}


def test_a_sequence_trains_each_system_from_the_adapter_before(student: Path, tmp_path: Path) -> None:
    plain = three_systems(model={"path": str(student)}, sft=SEQUENCE, partition=DISJOINT)
    config, run = Config.model_validate(plain), RunDirectory(tmp_path / "run")
    run.open(config)
    run_stage(config, run, "label")
    with tasks_here():
        parts, tested = stage1_parts(config, run), TokenTable(evaluation_table(config, run))
    assert tested.systems.tolist() == [UNLABELLED] * len(read_table(run.data / "test.parquet"))
    jobs = [part.job for part in parts]
    folders = [run.sft / "system2", run.sft / "system3", run.sft]
    assert [part.folder for part in parts] == folders
    assert [Path(job.adapter_out) for job in jobs] == [each / "adapter" for each in folders]
    assert [Path(job.adapter_in) for job in jobs] == [run.adapter, *(each / "adapter" for each in folders[:-1])]
    assert [job.systems for job in jobs] == [job.examples["systems"] for job in jobs] == [[2], [3], [1]]
    assert {job.regions for job in jobs} == {str(run.partition / FILE)}
    stage = PIPELINE["sft"]
    owned = [run.root / each for each in (*stage.outputs, *stage.traces, *stage.scratch)]
    written = [Path(place) for job in jobs for place in (job.adapter_out, job.metrics, job.checkpoints)]
    assert len(set(written)) == 9 and all(any(place.is_relative_to(own) for own in owned) for place in written)
    assert len({job.name for job in jobs}) == 3 and not any("/" in job.name for job in jobs)
    assert config.evaluated == ["base", "sft-2", "sft-3", "sft"]
    assert PIPELINE["evaluate"].needs(config) == ("label", "sft")
    together = Config.model_validate({**plain, "sft": {**SEQUENCE, "sequence": False}})
    assert together.sft.parts == [[2, 3, 1]] and together.evaluated == ["base", "sft"]
    assert shape_of(together) != shape_of(config)


def test_only_adapters_that_are_missing_are_trained(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = three_systems(model={"path": str(student)}, sft=SEQUENCE, partition=DISJOINT)
    config, run = Config.model_validate(plain), RunDirectory(tmp_path / "run")
    run.open(config)
    run_stage(config, run, "label")
    started: list[str] = []
    monkeypatch.setattr("lorapar_ray.sft.job.run_workers", lambda _, payload, **__: started.append(payload["name"]))
    done = run.sft / "system2" / "adapter"
    done.mkdir(parents=True)
    (done / "adapter_config.json").write_text("{}")
    with tasks_here():
        notes = train_stage1(config, run)
    assert started == ["tiny-sft-system3", "tiny-sft"]
    assert notes["examples"] == len(read_table(run.labels))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sft": {"sequence": True}}, "sequence: needs several Systems"),
        ({"sft": SEQUENCE}, "each System needs a region of its own"),
        ({"sft": {**SEQUENCE, "masked": False}, "order": ["sft", "grpo"]}, "trains a LoRA by SFT alone"),
        ({"sft": SEQUENCE, "partition": DISJOINT, "evaluate": {"models": ["sft-1"]}}, "leaves sft-2, sft-3, sft"),
        ({"evaluate": {"models": ["sft-2"]}}, "sft-2 is no adapter of this run"),
    ],
)
def test_a_sequence_that_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(three_systems(**changes))


def course(seed: int, *rows: tuple[float, ...], n: int = 100) -> Course:
    """Accuracies on n questions of each System, the first of which are right."""
    right = tuple(
        {system: {f"{system}-{q}": q < round(share * n) for q in range(n)} for system, share in enumerate(row, start=1)}
        for row in rows
    )
    return Course(seed, tuple(range(1, len(rows) + 1)), right)


def test_backward_transfer_is_the_mean_change_of_the_earlier_skills() -> None:
    found = course(1, (0.6, 0.1, 0.2), (0.5, 0.4, 0.2), (0.3, 0.5, 0.7))
    assert found.backward_transfer == pytest.approx(((0.3 - 0.6) + (0.5 - 0.4)) / 2)
    assert found.reached == pytest.approx((0.6 + 0.4 + 0.7) / 3)
    assert found.kept == pytest.approx((0.3 + 0.5 + 0.7) / 3)
    other = course(2, (0.2, 0.1, 0.0), (0.5, 0.4, 0.2), (0.1, 0.5, 0.3))
    assert mean_skills([found, other])[0] == pytest.approx((0.4, 0.1, 0.1))


def test_arms_are_compared_seed_by_seed() -> None:
    claim = Claim("the first forgets less", "first", "second")
    first = [course(seed, (0.8, 0.1), (0.75, 0.5)) for seed in (1, 2, 3, 4)]
    second = [course(seed, (0.7, 0.1), (0.4 + 0.01 * seed, 0.6)) for seed in (1, 2, 3)]
    found = compare(claim, {"first": first, "second": second}, (1, 2, 3, 4))
    assert isinstance(found, Forgetting) and found.found == "held" and found.effect.difference == pytest.approx(0.23)
    assert "first lost 5.0 and second 28.0 points" in found.sentence
    assert "over 3 seeds and n = 100 questions" in found.sentence
    assert "own training a System reached 65.0% and 65.0%. Seed 4 is left out: a run of the two" in found.sentence
    reverse = compare(Claim("x", "second", "first"), {"first": first, "second": second})
    assert reverse.found == "not held"
    one = compare(claim, {"first": first[:1], "second": second})
    assert one.found == "undecided"
    assert "questions of one seed), but one seed does not tell an arm from its seeds" in one.sentence
    none = compare(claim, {"first": first})
    assert none.found == "undecided" and "are not compared, since no seed has results of both" in none.sentence


def test_an_arm_that_had_less_to_forget_did_not_forget_less() -> None:
    claim = Claim("the first forgets less", "first", "second")
    arms = {"first": [course(seed, (0.2, 0.1), (0.15, 0.5)) for seed in (1, 2, 3)]}
    arms["second"] = [course(seed, (0.7, 0.1), (0.4, 0.6)) for seed in (1, 2, 3)]
    found = compare(claim, arms)
    assert isinstance(found, Forgetting) and found.found == "undecided" and found.effect.found() == "held"
    assert found.starts.difference == pytest.approx(-0.5)
    assert "but first is not shown to have had as much to lose (right after their own training first" in found.sentence
    assert compare(Claim("x", "second", "first"), arms).found == "undecided"


def test_seeds_that_agree_have_an_interval_over_questions() -> None:
    claim = Claim("the first forgets less", "first", "second")
    arms = {"first": [course(seed, (0.6, 0.1), (0.59, 0.5)) for seed in (1, 2, 3)]}
    arms["second"] = [course(seed, (0.6, 0.1), (0.58, 0.5)) for seed in (1, 2, 3)]
    found = compare(claim, arms)
    assert isinstance(found, Forgetting) and found.effect.difference == pytest.approx(0.01)
    assert found.found == "undecided" and found.effect.interval[0] < -0.01


def test_the_report_shows_the_skills_after_every_system(tmp_path: Path) -> None:
    plan = make_plan("systems", SHIPPED, [], tmp_path, seeds=[1, 2, 3], only=["disjoint", "unmasked"])
    units = plan.units({})
    assert [unit.config.partition.theta for unit in units[::3]] == [0.9, 1.0]
    assert "each run trains System 1, 2, 3 one after the other" in "\n".join(described(plan))
    for unit in units:
        lost = 2 if unit.arm == "disjoint" else 20 + unit.seed
        skills = {"sft-1": (60, 5, 6), "sft-2": (60 - lost, 50, 6), "sft": (60 - 2 * lost, 50 - lost, 70)}
        finish_sequence(unit, skills | ({"base": (10, 11, 12)} if unit is units[0] else {}), times=3)
        record_finished(unit)
    text = report(plan)
    assert "| disjoint | -3.0 points | -4.5 to -1.5 | 60.0% | 58.0% | 10.0%, 20.0%, 30.0% | 3 |" in text
    assert "| nothing | 10.0% | 11.0% | 12.0% |" in text and "| System 2 | 58.0% | 50.0% | 6.0% |" in text
    assert (
        "- **held**: Disjoint regions forget less than training every element: disjoint lost 3.0 and unmasked" in text
    )
    assert "- **held**: Disjoint regions end higher than training every element" in text
    assert "| 1 and 2 | 0.510 | 0.400 | 0.600 | 0.700 |" in text and "keeps, in the first run of disjoint" in text
    assert (tmp_path / "systems.md").read_text() in text
    tex = (tmp_path / "systems.tex").read_text()
    assert r"disjoint & -3.0 points & -4.5 to -1.5 & 60.0\% & 58.0\% &" in tex and tex.count(r"\begin{tabular}") == 4
    cells = (tmp_path / "systems.csv").read_text().splitlines()
    assert len(cells) == 1 + 6 * 9 and "disjoint,1,2,1,0.58" in cells
    page = (tmp_path / "index.html").read_text()
    assert "<td>-4.5 to -1.5</td>" in page and "<h3>Accuracy of unmasked, means over seeds</h3>" in page
    assert "right after training each System" in page and "✓ held" in page and "6 of 6 runs are evaluated" in page
    regions = units[0].run.partition / "systems.json"
    regions.write_text(json.dumps({"theta": 0.9, "jaccard": {}, "systems": {"1": {}}}))
    with pytest.raises(UserError, match=r"systems\.json' is damaged"):
        report(plan)
    (units[0].run.eval / "sft-2.json").unlink()
    assert read_course(units[0].folder, units[0].config) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.test.1.system=1"], "data.test: no entry has system 2"),
        (["sft.systems=[2]", "sft.sequence=false"], "--set sft.sequence: the grid 'systems' sets it itself"),
        (["sft.systems=[2]"], "sequence: needs several Systems"),
        (["partition.regions=own"], "--set partition.regions: the grid"),
    ],
)
def test_a_grid_of_systems_says_what_does_not_fit(overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        make_plan("systems", SHIPPED, overrides, tmp_path, seeds=[1])


@pytest.mark.parametrize("arms", [1, 2])
def test_a_system_of_a_sequence_moves_only_its_own_region(
    arms: int, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained in this process instead of a group of workers."""
    for module in ("job", "together"):
        monkeypatch.setattr(f"lorapar_ray.sft.{module}.run_workers", lambda work, payload, **_: work(payload))
    for module in ("worker", "arms_worker"):
        monkeypatch.setattr(f"lorapar_ray.sft.{module}.this_worker", lambda: Worker(0, 1, torch.device("cpu")))
    members = [ready_sequence(student, tmp_path / str(number)) for number in range(arms)]
    notes = [train_stage1(*members[0])] if arms == 1 else train_together(members)
    assert [each["steps"] for each in notes] == [6] * arms
    for config, run in members:
        masks = {system: mask_of_systems(run.partition / FILE, [system]) for system in (1, 2, 3)}
        before = weights(run.adapter)
        for system, name in zip(config.sft.systems, config.trained, strict=True):
            after = weights(run.trained(name) / "adapter")
            moved = {key: before[key].view(torch.int32) != after[key].view(torch.int32) for key in before}
            assert not (flat(moved) & ~flat(masks[system])).any()
            assert flat(moved)[flat(masks[system])].float().mean() > 0.9
            before = after
