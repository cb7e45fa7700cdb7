"""`lorapar evaluate --model`: real engines that are killed, a driver that is killed, and lm-eval's own command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny_run import ROOT, save_tiny_student

pytestmark = pytest.mark.e2e
QUESTIONS = 160
ENGINE = ("dtype=float32", "max_num_seqs=8", "enforce_eager=true", "max_model_len=128")


def adapter(student: Path, folder: Path) -> Path:
    """A LoRA whose B is not zero, as PEFT saves it."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(student),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder)
    return folder


def questions(file: Path) -> Path:
    rows = [
        {
            "question": f"What is {place} and one?",
            "choices": {"text": [str(place + 1), f"the number {place}", "none"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[place % 3],
        }
        for place in range(QUESTIONS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lorapar_ray.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def shards(out: Path) -> set[Path]:
    return set((out / "answers").rglob("*.parquet"))


def until(process: subprocess.Popen[str], condition: Callable[[], Any], seconds: float = 400.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(process.communicate()[0])


def engine_of(process: subprocess.Popen[str]) -> Any:
    """The process of an engine's core below the driver's Ray."""
    found = psutil.Process(process.pid).children(recursive=True)
    return next((each for each in found if "EngineCore" in " ".join(each.cmdline() or [each.name()])), None)


def test_nothing_answered_is_asked_again_whoever_is_killed(tmp_path: Path) -> None:
    student = save_tiny_student(tmp_path / "student")
    lora = adapter(student, tmp_path / "lora")
    data, out = questions(tmp_path / "arc.jsonl"), tmp_path / "out"
    settings = [part for each in ENGINE for part in ("--set", f"evaluate.engine.{each}")]
    command = ["evaluate", "--model", student, "--model", f"{student}+{lora}", "--tasks", "arc_easy@0", *settings]
    command += ["--data", f"arc_easy={data}", "--out", out]

    driver = started(*command)
    until(driver, lambda: shards(out))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    first = {file: file.stat().st_ino for file in shards(out)}
    assert first

    driver = started(*command)
    until(driver, lambda: len(shards(out)) > len(first))
    core = engine_of(driver)
    if core is not None:
        os.kill(core.pid, signal.SIGKILL)
    said, _ = driver.communicate(timeout=500)
    assert driver.returncode == 0, said
    assert core is not None, said

    names = ["student", "student_lora"]
    results = {file.parent.name: json.loads(file.read_text())["results"] for file in (out / "tasks").rglob("*.json")}
    assert len(results) == 2 and all(share["n"] == QUESTIONS for shares in results.values() for share in shares), names
    rows = {file.parent.name: pq.read_table(file).to_pylist() for file in (out / "rows").rglob("*.parquet")}
    base, tuned = (rows[name] for name in sorted(rows, key=len))
    assert [row["completion"] for row in base] != [row["completion"] for row in tuned]
    answered = [pq.read_table(folder, columns=["key"])["key"].to_pylist() for folder in (out / "answers").iterdir()]
    assert all(len(keys) == len(set(keys)) for keys in answered), "a question was asked again"
    assert "Compared question by question" in (out / "index.html").read_text()

    again = started(*command)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "starting" not in said, said

    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    arguments = f"pretrained={student},adapter={lora},serve=adapter,dtype=float32,enforce_eager=True,max_model_len=128"
    theirs = started(
        *("lm-eval", "--model", "lorapar", "--model_args", arguments, "--tasks", "mine"),
        *("--include_path", tmp_path, "--output_path", tmp_path / "lm-eval"),
    )
    said, _ = theirs.communicate(timeout=400)
    assert theirs.returncode == 0, said
    [file] = (tmp_path / "lm-eval").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["mine"]["acc,none"]
    [ours] = [share["accuracy"] for share in results[max(results, key=len)] if share["metric"] == "acc"]
    assert found == pytest.approx(ours, abs=2 / QUESTIONS), re.sub(r"\s+", " ", said)[-400:]
