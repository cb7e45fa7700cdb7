"""The tutorial's scripts and config, copied from the page, with the tiny student as the model and without an engine."""

import re
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorapar_ray.adapters import attach_lora, save_adapter
from lorapar_ray.cli import app
from lorapar_ray.config_file import load_config
from lorapar_ray.datasets.prepare import prepare
from lorapar_ray.grpo.environments.registry import get_environment
from lorapar_ray.grpo.environments.trajectory import Limits
from lorapar_ray.grpo.rewards.calling import call
from lorapar_ray.grpo.rewards.registry import get_reward
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import ROOT, save_tiny_student
from tests.unit.faked_engine import Engine, played

FILE = re.compile(r'```\w+ title="([^"]+)"\n(.*?)```', re.DOTALL)


def test_the_files_of_the_tutorial_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = save_tiny_student(tmp_path / "student")
    for name, text in FILE.findall((ROOT / "docs" / "tutorial.md").read_text()):
        (tmp_path / name).write_text(text.replace("package:smollm2-135m-instruct", str(student)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    runpy.run_path("make_questions.py")
    config = load_config(Path("mine.yaml"), [])
    rows = prepare(config, RunDirectory(tmp_path / "runs" / "mine"))
    assert rows["test"] > 12 and 40 < rows["train"] < 64 and rows["train"] + rows["test"] + rows["rejected"] == 80

    plan = CliRunner().invoke(app, ["run", "mine.yaml", "--run-dir", "other", "--dry-run"])
    assert plan.exit_code == 0 and "grpo       will run" in plan.output

    [reward] = config.grpo.rewards
    request = {"prompts": ["a", "b", "c"], "completions": ["7", "It is 9", "?"], "columns": {"answer": ["7"] * 3}}
    assert call(get_reward(reward.name), request, own=False) == [1.0, 1 / 3, 0.0]

    engine = Engine("7<|im_end|>", "It is 9<|im_end|>", "8<|im_end|>")
    asked = {"prompt_ids": [5, 6, 7], "answer": "9"}
    record = played(get_environment("my_environment:second_try"), engine, limits=Limits(16, 96, 49152), row=asked)
    assert (record.head.turns, record.head.rewards, record.head.lost) == ((2,), (0.5,), ())

    adapted = attach_lora(AutoModelForCausalLM.from_pretrained(student), rank=4, alpha=8)
    save_adapter(adapted, tmp_path / "runs/mine/grpo/adapter")
    capsys.readouterr()
    runpy.run_path("use_it.py")
    assert capsys.readouterr().out.strip()
