"""`lorapar evaluate --model`: real engines that are killed, a driver that is killed, and lm-eval's own command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from lorapar_ray.adapters import residual_base
from lorapar_ray.evaluation.harness.catalogue import Catalogue, quiet, wanted
from lorapar_ray.evaluation.harness.results import rows_of
from tests.pissa import trained_pissa
from tests.tiny_run import ROOT, save_tiny_student

pytestmark = pytest.mark.e2e
QUESTIONS = 160
ENGINE = ("dtype=float32", "max_num_seqs=8", "enforce_eager=true", "max_model_len=128")
SAMPLES = ("samples=4", "temperature=0.8", "pass_at=2", "max_gen_toks=12")
WORDS = ("red", "blue", "green", "black", "white", "brown", "grey")
PREAMBLE = "A question about colours and numbers, of which one of three answers is right. " * 2
"""Longer than a block of vLLM's cache, which the choices of a question share."""
TOLERANCE = 2e-3
"""Nats, of a choice's log-probability as it is shown."""
PROGRAM = {
    "task_id": "tiny/0",
    "prompt": 'def double(n):\n    """Twice n."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}


@dataclass
class Pissa:
    """A PiSSA adapter after some training."""

    residual: Path
    """The base that it was trained on."""
    adapter: Path
    plain: Path
    """The same as an ordinary LoRA for the original base."""


def pissa(student: Path, folder: Path) -> Pissa:
    model = trained_pissa(student, folder, drift=2.0)
    residual_base(model).save_pretrained(folder / "residual")
    AutoTokenizer.from_pretrained(student).save_pretrained(folder / "residual")
    return Pissa(folder / "residual", folder / "adapter", folder / "plain")


def questions(file: Path) -> Path:
    rows = [
        {
            "question": f"{PREAMBLE} What is {place} and one?",
            "choices": {"text": [f"{WORDS[(place + at) % 7]} {place}" for at in range(3)], "label": ["A", "B", "C"]},
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


@pytest.mark.fault("evaluate", "engine child", "driver")
def test_nothing_answered_is_asked_again_whoever_is_killed(tmp_path: Path) -> None:
    student = save_tiny_student(tmp_path / "student")
    tuned = pissa(student, tmp_path)
    data, out = questions(tmp_path / "arc.jsonl"), tmp_path / "out"
    (tmp_path / "programs.jsonl").write_text(json.dumps(PROGRAM) + "\n")
    settings = [f"evaluate.engine.{each}" for each in ENGINE] + [f"evaluate.{each}" for each in SAMPLES]
    command = ["evaluate", "--model", tuned.residual, "--model", f"{tuned.residual}+{tuned.adapter}", "--out", out]
    command += ["--tasks", "arc_easy@0,humaneval", "--data", f"arc_easy={data}"]
    command += [
        "--data",
        f"humaneval={tmp_path / 'programs.jsonl'}",
        *(x for each in settings for x in ("--set", each)),
    ]

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

    names = ("residual", "adapter")
    [base, ours], [_, samples] = (
        [next((out / "rows").glob(f"*{name}/{task}.parquet")) for name in names] for task in ("arc_easy@0", "humaneval")
    )
    rows = {file: pq.read_table(file).to_pylist() for file in (base, ours, samples)}
    assert len(rows[base]) == len(rows[ours]) == 2 * QUESTIONS  # acc and acc_norm
    assert [row["right"] for row in rows[base]] != [row["right"] for row in rows[ours]]
    assert_decided_as_by_hf(rows[ours], student, tuned.plain, data)
    [row] = rows[samples]
    assert row["value"] in (0.0, 0.5, 1.0) and len(set(row["completion"].split("\n"))) > 1, row
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
    arguments = (
        f"pretrained={student},adapter={tuned.plain},serve=adapter,dtype=float32,enforce_eager=True,max_model_len=128"
    )
    theirs = started(
        *("lm-eval", "--model", "lorapar", "--model_args", arguments, "--tasks", "mine"),
        *("--include_path", tmp_path, "--output_path", tmp_path / "lm-eval"),
    )
    said, _ = theirs.communicate(timeout=400)
    assert theirs.returncode == 0 and "Traceback" not in said, said
    [file] = (tmp_path / "lm-eval").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["mine"]["acc,none"]
    rights = [row["value"] for row in rows[ours] if row["metric"] == "acc"]
    assert found == pytest.approx(sum(rights) / QUESTIONS, abs=2 / QUESTIONS), re.sub(r"\s+", " ", said)[-400:]


def assert_decided_as_by_hf(rows: list[dict[str, Any]], student: Path, plain: Path, data: Path) -> None:
    """lm-eval's own `hf` class, with the plain adapter on the original base, gives each choice the same chance."""
    hf = HFLM(pretrained=str(student), peft=str(plain), device="cpu", dtype="float32", batch_size=16, max_length=127)
    with quiet():
        found = evaluate(hf, Catalogue({"arc_easy": str(data)}).load(wanted("arc_easy@0")), bootstrap_iters=0)
    margins = []
    for row, other in zip(rows, rows_of(found), strict=True):
        scores, wanted_scores = (
            [float(line.split()[0]) for line in each["completion"].split("\n")] for each in (row, other)
        )
        assert scores == pytest.approx(wanted_scores, abs=TOLERANCE)
        best, second, *_ = sorted(scores, reverse=True)
        if row["metric"] == "acc" and best - second > 2 * TOLERANCE:
            assert row["right"] == other["right"], row
            margins.append(best - second)
    assert len(margins) > 0.9 * QUESTIONS
