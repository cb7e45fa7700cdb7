"""How much of the first stage's skill the second stage loses: points, lines, and lines compared at equal gain."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorapar_ray.ablations.description import described
from lorapar_ray.ablations.equal_gain import Kept, compare, cost_at
from lorapar_ray.ablations.grid import Claim
from lorapar_ray.ablations.grids import GRIDS
from lorapar_ray.ablations.job import _run_part
from lorapar_ray.ablations.plan import make_plan
from lorapar_ray.ablations.report import report
from lorapar_ray.ablations.retention import Point, read_point, systems_of_tasks
from lorapar_ray.ablations.verdicts import Uncompared, question_reach
from lorapar_ray.config_file import load_config
from lorapar_ray.datasets.rows import Row
from lorapar_ray.datasets.sources import read_source, task_of
from lorapar_ray.errors import UserError
from tests.tiny_run import ROOT
from tests.unit.finished_units import finish_skills, record_finished

CONFIG = ROOT / "jobs" / "configs" / "quickstart.yaml"
CLAIM = Claim("the first keeps more", "first", "second")


def point(seed: int, gain: float, cost: float, n: int = 1000, start: float = 0.6) -> Point:
    """A run whose changes are of the first of n questions of each skill; of the first skill it has `start` before."""
    gained, lost = (
        {f"{name}{q}": (q < abs(each) * n) * (1 if each > 0 else -1) for q in range(n)}
        for name, each in (("riddle", round(gain, 9)), ("sum", round(cost, 9)))
    )
    first = {f"sum{q}": q < round(start * n) for q in range(n)}
    return Point(seed, gained, lost, first)


def found(claim: Claim, lines: dict[str, list[Point]], seeds: tuple[int, ...] = (1, 2, 3)) -> Kept:
    """The verdict on two lines, whose arms are their points of one seed in their order."""
    kept = looked(claim, lines, seeds)
    assert isinstance(kept, Kept)
    return kept


def looked(
    claim: Claim, lines: dict[str, list[Point]], seeds: tuple[int, ...] = (1, 2, 3), *more: str
) -> Kept | Uncompared:
    """As `found`; `more`: planned arms of the second line without results."""
    arms: dict[str, dict[str, list[Point]]] = {}
    for line, points in lines.items():
        for each in points:
            own = arms.setdefault(line, {})
            place = sum(each.seed == other.seed for arm in own.values() for other in arm)
            own.setdefault(f"{line}-{place}", []).append(each)
    planned = {line: list(own) for line, own in arms.items()}
    planned["second"] = [*planned.get("second", []), *more]
    return compare(claim, arms, planned, seeds)


def test_a_line_begins_where_nothing_was_trained() -> None:
    points = [(0.1, 0.05), (0.3, 0.09), (-0.1, 0.5)]
    assert cost_at(points, 0.05) == pytest.approx(0.025)
    assert cost_at(points, 0.2) == pytest.approx(0.07)
    assert cost_at(points, 0.3) == pytest.approx(0.09)
    assert cost_at(points, 0.0) == 0
    with pytest.raises(ValueError, match="beyond"):
        cost_at(points, 0.31)


def test_lines_are_compared_at_equal_gain_seed_by_seed() -> None:
    first = [point(seed, gain, 0.1 * gain) for seed in (1, 2, 3) for gain in (0.1, 0.3)]
    second = [point(seed, 0.2, 0.08 + 0.001 * seed) for seed in (1, 2, 3, 4)]
    kept = found(CLAIM, {"first": first, "second": second})
    assert kept.gains == (0.2, 0.2, 0.2)
    assert kept.effect.difference == pytest.approx(0.062) and kept.found == "held"
    assert "at a gain of 20.0 points" in kept.sentence and "first kept +6.2 points more" in kept.sentence
    assert "over 3 seeds and n = 2000 questions); the first stage's went from 60.0% to 58.0% in first" in kept.sentence
    assert kept.sentence.endswith("and from 60.0% to 51.8% in second, so the claim held here.")
    reverse = found(Claim("x", "second", "first"), {"first": first, "second": second})
    assert reverse.found == "not held"
    few = found(CLAIM, {"first": first[:2], "second": second}, (1,))
    assert few.found == "undecided" and few.effect.seeds == 1
    assert few.sentence.endswith("(a verdict needs 3 seeds).")


def test_a_line_that_had_less_to_lose_did_not_keep_more() -> None:
    """From 15 to 10 % it loses less than from 60 to 35 %, of a skill that it hardly had."""
    small = [point(seed, 0.3, 0.05, start=0.15) for seed in (1, 2, 3)]
    large = [point(seed, 0.3, 0.25, start=0.6) for seed in (1, 2, 3)]
    kept = found(CLAIM, {"first": small, "second": large})
    assert kept.found == "undecided" and kept.effect.found() == "held"
    assert "kept +20.0 points more" in kept.sentence
    assert (
        "went from 15.0% to 10.0% in first and from 60.0% to 35.0% in second, but first is not shown" in kept.sentence
    )
    assert "(first began -45.0 points above second; 95 % interval" in kept.sentence
    reverse = found(Claim("x", "second", "first"), {"first": small, "second": large})
    assert reverse.found == "undecided" and "but first is not shown to have had as much" in reverse.sentence
    more = [point(seed, 0.3, 0.05, start=0.7) for seed in (1, 2, 3)]
    assert found(CLAIM, {"first": more, "second": large}).found == "held"


def test_seeds_that_gained_decide_nothing_without_the_others() -> None:
    """Chosen by their outcome, they are no sample of all; and a line without any gain keeps its claim."""
    first = [point(seed, 0.3, 0.02) for seed in range(8)]
    second = [point(seed, 0.3 if seed < 3 else -0.1, 0.2) for seed in range(8)]
    some = found(CLAIM, {"first": first, "second": second}, tuple(range(8)))
    assert some.found == "undecided" and some.effect.found() == "held" and some.effect.seeds == 3
    assert "but second gained nothing in the second stage in 5 of 8 seeds (3, 4, 5, 6, 7), and the o" in some.sentence
    none = looked(CLAIM, {"first": first[1:4], "second": [point(seed, 0.0, 0.0) for seed in (1, 2, 3)]})
    assert isinstance(none, Uncompared) and none.found == "undecided"
    assert "second gained nothing in the second stage in 3 of 3 seeds (1, 2, 3), which leaves no" in none.sentence
    assert none.sentence.endswith("had 60.0% of the first skill and second 60.0%), so it is undecided.")


def test_only_seeds_with_every_run_of_both_lines_are_compared() -> None:
    first = [point(seed, 0.2, 0.02) for seed in (1, 2, 3, 4)]
    second = [point(seed, gain, 0.2) for seed in (1, 2, 3) for gain in (0.1, 0.3)] + [point(4, 0.3, 0.9)]
    kept = found(CLAIM, {"first": first, "second": second}, (1, 2, 3, 4))
    assert kept.found == "held" and kept.effect.seeds == 3
    assert kept.sentence.endswith(" Left out for missing results: second-1, seed 4.")
    lost = looked(CLAIM, {"first": first, "second": second}, (1, 2, 3, 4), "second-2")
    assert isinstance(lost, Uncompared) and lost.found == "undecided"
    assert (
        "no seed has results of all their runs; missing: second-1, seed 4; second-2, seed 1, 2, 3, 4" in lost.sentence
    )
    alone = looked(CLAIM, {"first": first}, (1, 2), "second-1")
    assert "not compared, since no seed has results of all their runs; missing: second-1, seed 1, 2" in alone.sentence


def test_a_question_of_each_skill_moves_the_difference() -> None:
    """Where one line ends at the gain that is compared, the standard error is that of a sum of means: of what one line
    lost, and of the slope of the other times what was gained."""
    n = 1000
    steep = [point(seed, 0.4, 0.2, n) for seed in (1, 2, 3)]
    flat = [point(seed, 0.2, 0.0, n) for seed in (1, 2, 3)]
    kept = found(CLAIM, {"first": flat, "second": steep})
    assert kept.effect.difference == pytest.approx(0.1)
    # steep costs 0.2 / 0.4 · 0.2 there: d = cost · gain' / gain, of whose parts each has its share of the questions
    more = [1.0, -1.0]  # a question for either side, of each skill
    costs = [0.5 * (q < 0.2 * n) for q in range(n)] + more
    gains = [0.5 * (q < 0.2 * n) - 0.25 * (q < 0.4 * n) for q in range(n)] + more
    means = [sum(each) / n for each in (costs, gains)]
    variance = sum(
        sum((each - mean) ** 2 for each in group) / n**2 for group, mean in zip((costs, gains), means, strict=True)
    )
    low, high = kept.effect.interval
    assert (high - low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.02)


def test_lines_that_agree_in_every_seed_have_an_interval_over_questions() -> None:
    one_of_a_hundred = {"first": [point(seed, 0.1, 0.01, 100) for seed in (1, 2, 3)]}
    one_of_a_hundred["second"] = [point(seed, 0.1, 0.02, 100) for seed in (1, 2, 3)]
    kept = found(CLAIM, one_of_a_hundred)
    assert kept.effect.difference == pytest.approx(0.01)
    assert kept.found == "undecided" and kept.effect.interval[0] < -0.01


def test_a_question_more_of_either_skill_counts_whole() -> None:
    """Bonett and Price's interval of the first skill's change alone lies within: 1 of 20 questions lost more."""
    arms = {"first": [point(seed, 0.1, 0.0, 20) for seed in (1, 2, 3)]}
    arms["second"] = [point(seed, 0.1, 0.05, 20) for seed in (1, 2, 3)]
    kept = found(CLAIM, arms)
    below, above = question_reach([[1.0] + [0.0] * 19])
    assert kept.effect.difference == pytest.approx(0.05)
    assert kept.effect.interval[0] < 0.05 - below and kept.effect.interval[1] > 0.05 + above


@pytest.mark.parametrize("grid", ["retention", "retention-reversed"])
def test_the_report_says_what_the_second_stage_cost(grid: str, tmp_path: Path) -> None:
    arms = [arm.name for arm in GRIDS[grid].arms if arm.line in ("disjoint", "unmasked")]
    plan = make_plan(grid, CONFIG, [], tmp_path, seeds=[1, 2, 3], only=arms)
    units = plan.units({})
    first, second = units[0].config.order
    assert units[0].config.evaluated == ["base", first, second] and units[1].config.evaluated == [first, second]
    rates = [getattr(unit.config, second).learning_rate for unit in units[::3][:3]]
    assert rates == pytest.approx([0.5e-3, 1e-3, 2e-3])
    assert "disjoint regions keep more than training every element, at equal gain" in "\n".join(described(plan))
    for unit in units:
        number = int(10 * {"0.5": 1, "1": 2, "2": 3}[unit.arm.partition("-")[2]])
        cost = number // 10 if unit.arm.startswith("disjoint") else number
        skills = {"sft": (60, 20), "grpo": (60 - cost, 20 + number)}
        if grid == "retention-reversed":
            skills = {"grpo": (20, 60), "sft": (20 + number, 60 - cost + unit.seed % 2)}
        finish_skills(unit, skills, times=3)
        record_finished(unit)
    point = read_point(units[0].folder, units[0].config)
    assert point is not None and point.gain == pytest.approx(0.1)
    assert systems_of_tasks(units[0].run.labels) == {"sum": 1, "riddle": 2}
    text = report(plan)
    assert "| disjoint | disjoint-2 | +30.0 points |" in text and "- **held**: Disjoint regions keep more" in text
    assert "| unmasked | unmasked-2 | +30.0 points | 60.0% |" in text
    page = (tmp_path / "index.html").read_text()
    assert "Loss of the first stage's skill in the second" in page and "✓ held" in page
    assert (tmp_path / "retention.md").read_text() in text
    cells = (tmp_path / "retention.csv").read_text().splitlines()
    assert cells[0].startswith("line,arm,gained") and "disjoint,disjoint-2,0.3,0.6" in "\n".join(cells[1:])
    assert r"disjoint & disjoint-2 & +30.0 points & " in (tmp_path / "retention.tex").read_text()
    assert "Skills gained and lost in the second stage" in page and "<td>disjoint-2</td>" in page


def test_a_run_without_a_task_of_each_system_is_no_point(tmp_path: Path) -> None:
    [unit] = make_plan("retention", CONFIG, [], tmp_path, seeds=[1], only=["shared-1"]).units({})
    assert read_point(unit.folder, unit.config) is None
    finish_skills(unit, {"sft": (60, 20), "grpo": (50, 30)})
    pq.write_table(pa.table({"task": ["sum", "riddle"], "system": [1, 1]}), unit.run.labels / "part-00000.parquet")
    assert read_point(unit.folder, unit.config) is None


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("gsm8k-llama2-7b.yaml", [], "only 'gsm8k' is in both data.train and data.test; this grid needs two or more"),
        ("quickstart.yaml", ["data.test=[{reader: svamp}]"], "no task is in both data.train and data.test"),
        ("arithmetic.yaml", [], "label.strategy: random: a task's System would be arbitrary"),
        ("quickstart.yaml", ["label.shuffled=true"], "label.shuffled: true: a task's System would be arbitrary"),
        ("quickstart.yaml", ["grpo.systems=[1]"], "sft.systems and grpo.systems begin with the same System"),
    ],
)
def test_a_config_without_two_skills_is_refused_before_it_trains(
    file: str, changes: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        make_plan("retention", CONFIG.parent / file, changes, tmp_path, seeds=[1])


def test_labels_without_a_task_of_each_system_stop_a_run_before_it_trains(tmp_path: Path) -> None:
    """Which System a task is, only its labels say."""
    few = "{system: 2, reader: reasoning_gym, task: letter_counting, rows: 2, seed: 500}"
    own = "{{system: 1, reader: reasoning_gym, task: {}, rows: 9, seed: 1}}"
    tasks = ", ".join(own.format(task) for task in ("gcd", "letter_counting"))
    changes = [f"data.train=[{tasks}, {few}]", f"data.test=[{tasks.replace('seed: 1', 'seed: 200')}]"]
    changes += ["label.strategy=source", "label.teachers=[]"]
    plan = make_plan("retention", CONFIG, changes, tmp_path, seeds=[1], only=["shared-1"])
    [unit] = plan.units({})
    failed: list[str] = []
    assert not _run_part(unit, unit.stages, plan, failed)
    assert "most questions of no task are System 2 ('gcd' 1, 'letter_counting' 1)" in failed[0]
    assert list(unit.run.manifest()["stages"]) == ["label"]


def test_a_sources_task_is_that_of_its_rows(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "1 + 1", "answer": "2", "question": "1 + 1", "Body": "b"}\n')
    file = f"{{reader: file, path: {tmp_path / 'own.jsonl'}}}"
    named = f"{{reader: boolq, path: {tmp_path / 'boolq.jsonl'}}}"
    (tmp_path / "boolq.jsonl").write_text('{"passage": "p", "question": "q", "answer": true}\n')
    config = load_config(
        CONFIG, [f"data.test=[{file}, {named}, {{reader: reasoning_gym, task: gcd, rows: 1, seed: 1}}]"]
    )
    for source, task in zip(config.data.test, ("own", "boolq", "gcd"), strict=True):
        [row] = read_source(source, "data.test")
        assert isinstance(row, Row) and row.task == task_of(source) == task
