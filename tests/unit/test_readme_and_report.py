"""The README's examples run as they stand; the report escapes what models write and misses what has not run."""

import re
from pathlib import Path

from lorapar_ray.config import load_config
from lorapar_ray.importance import TokenizedExample, collate
from lorapar_ray.reporting import write_report
from lorapar_ray.reporting.page import verdicts
from lorapar_ray.runs import RunDirectory, write_json
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


def test_verdicts_say_no_more_than_the_intervals_do() -> None:
    said = verdicts(
        {"base": result(50, 100, 0.4, 0.6), "sft": result(52, 100, 0.42, 0.62), "grpo": result(9, 99, 0, 0.2)}
    )
    assert "no difference is shown" in said[0]
    assert "loss" in said[1]
