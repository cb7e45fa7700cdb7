"""A grid on tasks of lm-eval: the paper's tables on MMLU and HumanEval."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lorapar_ray.ablations.grids import GRIDS
from lorapar_ray.ablations.paper import figures_of
from lorapar_ray.ablations.plan import make_plan
from lorapar_ray.ablations.report import report
from lorapar_ray.ablations.results import task_answers
from lorapar_ray.cli import app
from lorapar_ray.config_file import load_config
from lorapar_ray.evaluation.stage import _require_tasks
from lorapar_ray.evaluation.task_files import result_file, rows_file
from tests.tiny_run import ROOT
from tests.unit.finished_units import record_finished

SHIPPED = ROOT / "jobs" / "configs"


@pytest.mark.parametrize(
    ("file", "task"), [("dolly", "mmlu"), ("platypus", "mmlu"), ("codealpaca", "humaneval"), ("gsm8k-qwen2.5-7b", "")]
)
def test_the_papers_other_tables_are_one_command_away(
    file: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ablate methods … --dry-run`; lm-eval loads a task once, not for each run."""
    loaded: list[list[str]] = []
    _require_tasks.cache_clear()
    monkeypatch.setattr("lorapar_ray.evaluation.tasks.catalogue_of", lambda settings: loaded.append(settings.tasks))
    config = SHIPPED / (file if "7b" in file else f"{file}-llama2-7b")
    done = CliRunner().invoke(app, ["ablate", "methods", f"{config}.yaml", "--dry-run", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "12 arms" in done.output and "pissa-rl" in done.output
    assert loaded == ([[task]] if task else [])


def test_the_papers_figures_are_of_the_same_data_and_model(tmp_path: Path) -> None:
    def column(*overrides: str) -> str:
        config = load_config(SHIPPED / "dolly-llama2-7b.yaml", overrides)
        return figures_of(GRIDS["methods"], config, "mmlu").of

    assert column() == "LLaMA2-7B, MMLU after Dolly"
    assert column("model.path=Qwen/Qwen2.5-7B") == "7B"


def test_arms_are_compared_on_tasks_of_lm_eval_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first metric that says right or wrong; the paper's figures are those of the training data and the task."""
    monkeypatch.setattr("lorapar_ray.evaluation.tasks.catalogue_of", lambda settings: None)
    arms, seeds = ("lora-2", "lora-par"), (1, 2, 3)
    file = SHIPPED / "dolly-llama2-7b.yaml"

    def finish(folder: Path, model: str, task: str, right: int) -> None:
        rows = [
            {"task": f"{task}_{place % 2}", "id": str(place), "metric": metric, "filter": "none", "right": correct}
            for place in range(100)
            for metric, correct in (("perplexity", None), ("acc", place < right), ("acc_norm", False))
        ]
        for path in (result_file(folder / "eval", model, task), rows_file(folder / "eval", model, task)):
            path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), rows_file(folder / "eval", model, task))
        result_file(folder / "eval", model, task).write_text("{}")

    def compare(tasks: list[str], out: Path) -> str:
        plan = make_plan("methods", file, [f"evaluate.tasks={tasks}"], out, seeds=seeds, only=arms)
        for unit in plan.units({}):
            for task in tasks:
                finish(unit.folder, "base", task, 40)
                finish(unit.folder, unit.config.order[-1], task, {"lora-2": 45, "lora-par": 70}[unit.arm])
            record_finished(unit)
        return report(plan)

    text = compare(["mmlu", "arc_easy"], tmp_path)
    assert "| base | – | – | 40.0% |" in text and "46.48" in text and "23.10" not in text
    (lora_par,) = [line for line in text.splitlines() if line.startswith("| lora-par |")][:1]
    assert "| 70.0% |" in lora_par and "| 46.34/47.09 |" in lora_par
    assert "paper (LLaMA2-7B, MMLU after Dolly)" in text and "Accuracy on mmlu." in text
    assert "another model" not in text  # the column names its model
    assert "- **held**: LoRA-PAR ends above two epochs of LoRA" in text
    other = (tmp_path / "table-arc_easy.md").read_text()
    assert "| 70.0% |" in other and "46.48" not in other and "**held**" in other
    page = (tmp_path / "index.html").read_text()
    assert "Accuracy on mmlu" in page and "Accuracy on arc_easy" in page and "On arc_easy: LoRA-PAR ends above" in page


def test_a_metric_with_values_between_wrong_and_right_compares_no_arms(tmp_path: Path) -> None:
    """The questions at 0 or 1 alone would be a biased choice."""

    def answers(**metrics: list[bool | None]) -> dict[str, bool] | None:
        rows = [
            {"task": "code", "id": str(place), "metric": metric, "filter": "none", "right": right}
            for metric, values in metrics.items()
            for place, right in enumerate(values)
        ]
        for path in (result_file(tmp_path, "sft", "code"), rows_file(tmp_path, "sft", "code")):
            path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), rows_file(tmp_path, "sft", "code"))
        result_file(tmp_path, "sft", "code").write_text("{}")
        return task_answers(tmp_path, "sft", "code")

    assert answers(f1=[None, True, False]) is None
    both, one = answers(f1=[None, True], exact=[False, True]), answers(f1=[False, True], exact=[False, True])
    assert both is not None and list(both.values()) == [False, True]
    assert one is not None and not both.keys() & one.keys()  # another metric: nothing to compare
