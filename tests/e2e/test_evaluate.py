"""`lorapar evaluate --model`: real engines that are killed, a driver that is killed, and lm-eval's own command line."""

import json
import signal
import subprocess
import time
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
from tests.chaos import Recovery
from tests.e2e.test_interruption import stop_when
from tests.pissa import trained_pissa
from tests.processes import below
from tests.tiny_run import ROOT, command, lorapar, lorapar_here, save_tiny_student
from tests.waiting import beside, wait_until

pytestmark = pytest.mark.e2e
QUESTIONS = 96
ENGINE = ("dtype=float32", "max_num_seqs=8", "enforce_eager=true", "max_model_len=128")
SAMPLES = ("samples=4", "temperature=0.8", "pass_at=2", "max_gen_toks=12")
WORDS = ("red", "blue", "green", "black", "white", "brown", "grey")
PREAMBLE = "A question about colours and numbers, of which one of three answers is right. " * 2
"""Longer than a block of vLLM's cache, which the choices of a question share."""
TOLERANCE = 2e-3
"""Nats, of a choice's log-probability as it is shown."""
TIES = 2
"""Questions of which two choices are so close that the order of additions decides."""
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


@dataclass
class Asked:
    """Two models, the tasks for them, and the command that says so."""

    student: Path
    tuned: Pissa
    data: Path
    arguments: tuple[str | Path, ...]

    def command(self, out: Path) -> tuple[str | Path, ...]:
        return (*self.arguments, "--out", out)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A PiSSA adapter and its residual base, on multiple-choice questions and a program."""
    folder = tmp_path_factory.mktemp("evaluate")
    student = save_tiny_student(folder / "student")
    tuned, data, programs = pissa(student, folder), questions(folder / "arc.jsonl"), folder / "programs.jsonl"
    programs.write_text(json.dumps(PROGRAM) + "\n")
    settings = [f"evaluate.engine.{each}" for each in ENGINE] + [f"evaluate.{each}" for each in SAMPLES]
    arguments = (
        *("evaluate", "--model", tuned.residual, "--model", f"{tuned.residual}+{tuned.adapter}"),
        *("--tasks", "arc_easy@0,humaneval", "--data", f"arc_easy={data}", "--data", f"humaneval={programs}"),
        *(part for each in settings for part in ("--set", each)),
    )
    return Asked(student, tuned, data, arguments)


@pytest.fixture(scope="module")
def engine_lost() -> list[float]:
    """When `evaluated` lost its engine, and had all answers: `time.monotonic()`."""
    return []


@pytest.fixture(scope="module")
def evaluated(cluster: None, asked: Asked, engine_lost: list[float], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its results; the engine is killed on the way."""
    out, before = tmp_path_factory.mktemp("evaluated") / "out", set[Path]()
    earlier = engine_cores()  # of a test before this one, which may still be ending

    def kill() -> None:
        wait_until("answers come", lambda: shards(out) and engine_cores() - earlier, 400)
        before.update(shards(out))
        for core in engine_cores() - earlier:
            core.kill()
        engine_lost.append(time.monotonic())

    with beside(kill):
        done = lorapar_here(*asked.command(out))
    engine_lost.append(time.monotonic())
    assert done.returncode == 0, done.stdout + done.stderr
    assert before < shards(out), "all was answered before the engine was killed"
    return out


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def shards(out: Path) -> set[Path]:
    return set((out / "answers").rglob("*.parquet"))


def engine_cores() -> set[psutil.Process]:
    """The processes of engines' cores below this process's Ray."""
    return set(below("EngineCore"))


def rows_by_model(out: Path, task: str) -> list[list[dict[str, Any]]]:
    """Of the base and of the adapter."""
    files = [next((out / "rows").glob(f"*{name}/{task}.parquet")) for name in ("residual", "adapter")]
    return [pq.read_table(file).to_pylist() for file in files]


def assert_asked_once(out: Path) -> None:
    answered = [pq.read_table(folder, columns=["key"])["key"].to_pylist() for folder in (out / "answers").iterdir()]
    assert answered and all(len(keys) == len(set(keys)) for keys in answered), "a question was asked again"


@pytest.mark.fault("evaluate", "engine child")
def test_a_killed_engine_costs_no_answer_and_choices_are_decided_as_by_hf(
    evaluated: Path, asked: Asked, engine_lost: list[float], recovery: Recovery
) -> None:
    lost, answered = engine_lost
    recovery.took(answered - lost, "evaluate", "engine child", "until the end")
    (base, ours), (_, samples) = rows_by_model(evaluated, "arc_easy@0"), rows_by_model(evaluated, "humaneval")
    assert len(base) == len(ours) == 2 * QUESTIONS  # acc and acc_norm
    assert [row["right"] for row in base] != [row["right"] for row in ours]
    assert_decided_as_by_hf(ours, asked.student, asked.tuned.plain, asked.data)
    [row] = samples
    assert row["value"] in (0.0, 0.5, 1.0) and len(set(row["completion"].split("\n"))) > 1, row
    assert_asked_once(evaluated)
    assert "Compared question by question" in (evaluated / "index.html").read_text()


def test_the_same_command_again_starts_nothing(evaluated: Path, asked: Asked) -> None:
    again = lorapar_here(*asked.command(evaluated))
    assert again.returncode == 0 and "starting" not in again.stdout, again.stdout + again.stderr


@pytest.mark.chaos("evaluate", "driver")
def test_a_killed_driver_costs_no_answer(
    chaos_round: int, recovery: Recovery, evaluated: Path, asked: Asked, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop_when(lambda: bool(shards(out)), signal.SIGKILL, *asked.command(out))
    before = {file: file.stat().st_mtime_ns for file in shards(out)}
    with recovery("evaluate", "driver"):
        again = lorapar(*asked.command(out))
    assert again.returncode == 0, again.stdout + again.stderr
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert_asked_once(out)
    for ours, theirs in zip(rows_by_model(out, "arc_easy@0"), rows_by_model(evaluated, "arc_easy@0"), strict=True):
        assert len(ours) == 2 * QUESTIONS
        for row, other in zip(ours, theirs, strict=True):
            assert scores_of(row) == pytest.approx(scores_of(other), abs=TOLERANCE)


def test_lm_evals_own_command_line_finds_the_same(evaluated: Path, asked: Asked, tmp_path: Path) -> None:
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(asked.data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    model = f"pretrained={asked.student},adapter={asked.tuned.plain}"
    theirs = started(
        *("lm-eval", "--model", "lorapar", "--tasks", "mine"),
        *("--model_args", f"{model},serve=adapter,dtype=float32,enforce_eager=True,max_model_len=128"),
        *("--include_path", tmp_path, "--output_path", tmp_path / "lm-eval", "--log_samples"),
    )
    said, _ = theirs.communicate(timeout=400)
    assert theirs.returncode == 0 and "Traceback" not in said, said
    [file] = (tmp_path / "lm-eval").rglob("samples_mine_*.jsonl")
    found = {str(sample["doc_id"]): sample["acc"] for sample in map(json.loads, file.read_text().splitlines())}
    base, ours = (
        {row["id"]: row["value"] for row in rows if row["metric"] == "acc"}
        for rows in rows_by_model(evaluated, "arc_easy@0")
    )
    assert found.keys() == ours.keys() == base.keys() and len(found) == QUESTIONS
    assert sum(found[each] != ours[each] for each in found) <= TIES < sum(found[each] != base[each] for each in found)


def scores_of(row: dict[str, Any]) -> list[float]:
    """Log-probabilities of a question's choices."""
    return [float(line.split()[0]) for line in row["completion"].split("\n")]


def assert_decided_as_by_hf(rows: list[dict[str, Any]], student: Path, plain: Path, data: Path) -> None:
    """lm-eval's own `hf` class, with the plain adapter on the original base, gives each choice the same chance."""
    hf = HFLM(pretrained=str(student), peft=str(plain), device="cpu", dtype="float32", batch_size=16, max_length=127)
    with quiet():
        found = evaluate(hf, Catalogue({"arc_easy": str(data)}).load(wanted("arc_easy@0")), bootstrap_iters=0)
    margins = []
    for row, other in zip(rows, rows_of(found), strict=True):
        assert scores_of(row) == pytest.approx(scores_of(other), abs=TOLERANCE)
        best, second, *_ = sorted(scores_of(row), reverse=True)
        if row["metric"] == "acc" and best - second > 2 * TOLERANCE:
            assert row["right"] == other["right"], row
            margins.append(best - second)
    assert len(margins) > 0.9 * QUESTIONS
