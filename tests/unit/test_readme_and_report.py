"""The README's examples run unchanged; the report escapes model-written text and leaves out stages that have not
run."""

import re
from pathlib import Path

from lorapar_ray.config import LabelConfig
from lorapar_ray.config_file import load_config
from lorapar_ray.datasets.rows import Row
from lorapar_ray.files import write_json
from lorapar_ray.importance import TokenizedExample, collate
from lorapar_ray.labeling.store import Answer
from lorapar_ray.labeling.summary import Session, Tally
from lorapar_ray.labeling.votes import Vote
from lorapar_ray.partition.systems import cut_systems
from lorapar_ray.reporting.page import verdicts, write_report
from lorapar_ray.runs import RunDirectory
from tests.unit.partition_scores import skewed
from tests.unit.tiny_models import tiny

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


def test_the_examples_in_the_readme_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    examples = [TokenizedExample(str(k), [k + 3, k + 4, k + 5, k + 6], 2) for k in range(4)]
    names = {"base_model": tiny(), "dataloader": [collate(examples, pad_id=0)]}
    for block in blocks:
        exec(block, names)
    kept, importance = names["kept"], names["importance"]
    total = sum(float(value.sum()) for value in importance.values())
    inside = sum(float(importance[key][mask].sum()) for key, mask in kept.items())
    assert 0.9 <= inside / total < 0.92
    assert names["optimizer"].state_bytes()["moments"] == 8 * sum(int(mask.sum()) for mask in kept.values())


def result(correct: int, n: int, low: float, high: float) -> dict[str, object]:
    entry = {"n": n, "correct": correct, "accuracy": correct / n, "interval": [low, high]}
    return {**entry, "by_task": {"sums": entry}}


def test_an_empty_run_has_a_report_that_says_so(tmp_path: Path) -> None:
    page = write_report(load_config(QUICKSTART), RunDirectory(tmp_path)).read_text()
    assert page.count("Not run yet") == 5


def test_what_a_model_wrote_cannot_run_in_the_report(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    evil = "<script>alert(1)</script>"
    line = {"step": 1, "reward": 0.5, "completion_length": 3.0, "ratio_mean": 1.0, "seconds/rollout": 1.0}
    sample = {"step": 1, "prompt": "q", "completion": evil, "answer": "1", "reward": 0.5}
    run.metrics.mkdir()
    write_json(run.eval / "base.json", result(20, 100, 0.13, 0.29))
    write_json(run.eval / "sft.json", result(50, 100, 0.40, 0.60))
    for name, entry in (("grpo", line), ("samples", sample)):
        write_json(run.metrics / f"{name}.json", entry)
        text = (run.metrics / f"{name}.json").read_text().replace("\n", "") + "\n"
        (run.metrics / f"{name}.jsonl").write_text(text)
    first = write_report(load_config(QUICKSTART), run).read_text()
    assert evil not in first and "&lt;script&gt;alert(1)" in first
    assert "20.0%" in first and "40.0% – 60.0%" in first
    assert "gain" in first
    assert 'id="plot-reward"' in first and 'id="plot-accuracies"' in first
    assert (run.report / "overview.png").stat().st_size > 10_000
    assert write_report(load_config(QUICKSTART), run).read_text() == first
    assert not re.findall(r'(?:src|href)="https?:', first)


def test_the_vote_of_three_systems_is_in_the_report_with_its_cost_and_latency(tmp_path: Path) -> None:
    run, evil = RunDirectory(tmp_path), "<script>alert(1)</script>"
    teachers = [{"name": n, "model": "m", "cost_per_million_tokens": 1e4} for n in ("first", "second")]
    label = LabelConfig.model_validate(
        {"teachers": teachers, "definitions": {1: "a", 2: "b", 3: "c"}, "examples": [], "sequential": True}
    )
    tally = Tally(label, {"first": [-0.5, -1.5, -2.5]}, seed=0, run="now")
    for i in range(9):
        votes = [Vote("first", 1 + i % 3, 0.7, 0.2), *([Vote("second", 2, 0.5, 0.2)] if i % 2 else [])]
        answers = {vote.teacher: [Answer([-1.0, -1.1, -1.2], 50, 0.25, "now")] for vote in votes}
        tally.add(Row(str(i), f"{evil} {i}", "1", "1", "task"), votes[0].system, votes, answers)
    session = Session("now", votes=13, starting_s=5.0, asking_s=2.0, dead={"second": "16 failures in a row"})
    write_json(run.labels / "summary.json", tally.summary(0, session))
    page = write_report(load_config(QUICKSTART), run).read_text()
    assert evil not in page and "of the 2 questions the teachers disagree on" in page
    assert "13 of 18 possible votes were asked for; 650 tokens, about 6.50 in cost" in page
    assert "1: +1.00 2: +0.00 3: -1.00" in page and "0.25 / 0.25 / 0.25" in page
    assert "teacher second was given up: 16 failures in a row" in page
    assert page.count("System 3") >= 1


def test_a_sequence_of_systems_has_its_regions_and_every_adapter_in_the_report(tmp_path: Path) -> None:
    config = load_config(ROOT / "jobs" / "configs" / "systems.yaml", ["sft.systems=[2,3,1]"])
    run, scores = RunDirectory(tmp_path), {system: skewed(system) for system in (1, 2, 3)}
    write_json(run.partition / "systems.json", cut_systems(scores, 0.9, regions="disjoint")[1])
    for name, right in (("base", 10), ("sft-2", 20), ("sft-3", 30), ("sft", 40)):
        write_json(run.eval / f"{name}.json", result(right, 100, right / 200, right / 50))
    page = write_report(config, run).read_text()
    assert "each System has a region of its own (disjoint), of 2,880 elements" in page and "1 and 3 0." in page
    tiles = re.findall(r'<div class="tile"><span class="soft">([^<]*)</span><b>([^<]*)</b>', page)
    assert tiles == [
        ("base", "10.0%"),
        ("stage 1, after System 2", "20.0%"),
        ("stage 1, after System 3", "30.0%"),
        ("stage 1 (SFT)", "40.0%"),
    ]
    assert "stage 1, after System 2 → stage 1, after System 3: +10.0 points" in page
    assert 'id="plot-accuracies"' in page and "lorapar partition" not in page


def test_verdicts_claim_no_more_than_the_answers_show() -> None:
    models = {"base": result(50, 100, 0.4, 0.6), "sft": result(52, 100, 0.42, 0.62), "grpo": result(9, 99, 0, 0.2)}
    said = verdicts(models, {})
    assert "the intervals overlap, so no difference is shown" in said[0]
    assert "the intervals lie apart, so this is a loss" in said[1]


def test_verdicts_compare_question_by_question_where_they_can() -> None:
    """Overlapping intervals hide what paired questions show: 12 of 100 gained, none lost."""
    models = {"base": result(50, 100, 0.4, 0.6), "sft": result(62, 100, 0.52, 0.71), "grpo": result(61, 100, 0.5, 0.7)}
    base = {str(key): key < 50 for key in range(100)}
    sft = {str(key): key < 62 for key in reversed(range(100))}
    grpo = {str(key): key < 61 for key in range(100)}
    gain, rest = verdicts(models, {"base": base, "sft": sft, "grpo": grpo})
    assert "12 questions gained, 0 lost, exact McNemar p = 0.00049; this is a gain." in gain
    assert "0 questions gained, 1 lost, exact McNemar p = 1; no difference is shown at this n." in rest
    assert "intervals overlap" in verdicts(models, {"base": base, "sft": {"another": True}})[0]
