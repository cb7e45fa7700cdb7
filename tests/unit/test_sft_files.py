"""Stage 1's files while it runs: checkpoints without pickle, metrics lines, trackers."""

import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from lorapar_ray import trackers
from lorapar_ray.boundary import last_line, read_lines
from lorapar_ray.errors import UserError
from lorapar_ray.grpo import job as grpo
from lorapar_ray.grpo.stage import STAGE as GRPO
from lorapar_ray.importance.stage import STAGE as SCORE
from lorapar_ray.progress import progress
from lorapar_ray.sft import job as sft
from lorapar_ray.sft.checkpoint import OPTIMIZER, PARAMETERS, STATE, WORKERS, last_checkpoint, rng_state, set_rng_state
from lorapar_ray.sft.stage import STAGE as SFT
from lorapar_ray.tensortree import load_tree, save_tree
from lorapar_ray.tracking import append_line, keep_lines_until, notices_of, require_trackers


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_every_generator_resumes_from_a_file(tmp_path: Path) -> None:
    draw()
    np.random.randn()  # keeps half of a pair, which is part of the state too
    save_tree(tmp_path / "rng.safetensors", rng_state())
    first = draw(), np.random.randn()
    draw()
    set_rng_state(load_tree(tmp_path / "rng.safetensors"))
    assert (draw(), np.random.randn()) == first


def checkpoint(folder: Path, step: int, ranks: int, state: str | None = None, workers: int | None = None) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in (PARAMETERS, OPTIMIZER, *(f"rng-{rank}.safetensors" for rank in range(ranks))):
        save_tree(path / name, {"step": torch.tensor(step), **({} if workers is None else {WORKERS: workers})})
    (path / STATE).write_text(json.dumps({"global_step": step}) if state is None else state)


def test_only_whole_checkpoints_are_resumed_from(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path, workers=2) is None
    checkpoint(tmp_path, 8, ranks=2)
    checkpoint(tmp_path, 10, ranks=2)
    checkpoint(tmp_path, 12, ranks=1)  # killed before the other worker wrote its state
    checkpoint(tmp_path, 14, ranks=2, state='{"global_st')  # killed while the last file was written
    for step, name in ((16, PARAMETERS), (18, OPTIMIZER), (20, "rng-1.safetensors")):
        checkpoint(tmp_path, step, ranks=2)
        file = tmp_path / f"checkpoint-{step}" / name
        file.write_bytes(file.read_bytes()[:-3])  # a disk that was full, a copy that was cut
    for step, state in ((22, "[]"), (24, '{"global_step": null}'), (26, "[" * 100_000)):
        checkpoint(tmp_path, step, ranks=2, state=state)
    assert last_checkpoint(tmp_path, workers=2) == (str(tmp_path / "checkpoint-10"), 10)
    checkpoint(tmp_path, 11, ranks=2, workers=2)
    checkpoint(tmp_path, 13, ranks=2, workers=3)  # the third was killed before it wrote its own
    for workers in (2, 3):
        assert last_checkpoint(tmp_path, workers) == (str(tmp_path / "checkpoint-11"), 11)


def test_lines_of_steps_to_repeat_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics" / "sft.jsonl"
    keep_lines_until(file, 0)
    for step in (1, 2, 3):
        append_line(file, {"step": step})
    with file.open("a") as lines:
        lines.write('{"step": 4, "lo')
    keep_lines_until(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d\x1ce", "half \ud83d emoji", "two\nlines"])
def test_a_completion_may_hold_any_character(tmp_path: Path, text: str) -> None:
    file = tmp_path / "samples.jsonl"
    for step in (1, 2, 3):
        append_line(file, {"step": step, "completion": text})
    keep_lines_until(file, 2)
    assert read_lines(file) == [{"step": step, "completion": text} for step in (1, 2)]
    assert last_line(file) == {"step": 2, "completion": text}


def test_progress_counts_the_steps_of_all_runs_that_train_together(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    assert sft.steps_done(*files) == (0, "starting workers")
    assert grpo.steps_done(*files) == (0, "starting engines and learners")
    line = {"loss": 0.5, "tokens_per_s": 20.0, "reward": 1.0, "completion_length": 6.6}
    append_line(Path(files[0]), {"step": 2, **line})
    assert sft.steps_done(*files) == (2, "loss 0.500 · 20 tokens/s")
    assert grpo.steps_done(*files) == (2, "reward 1.000 length 7")
    append_line(Path(files[2]), {"step": 3, **line})
    assert sft.steps_done(*files) == (5, "loss 0.500, 0.500 · 40 tokens/s")
    assert grpo.steps_done(*files) == (5, "reward 1.000, 1.000 length 7, 7")


def test_a_missing_tracker_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapar_ray.tracking.find_spec", lambda name: None if name == "wandb" else object())
    require_trackers(["tensorboard", "mlflow"], "sft.report_to")
    with pytest.raises(UserError, match=r"sft.report_to: 'wandb' is not installed; pip install wandb"):
        require_trackers(["tensorboard", "wandb"], "sft.report_to")


class FakeWandb(ModuleType):
    """Fake of W&B's client (wandb 0.31): records runs, and refuses a second one unless `create_new` asks for it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.active = 0

    def init(self, *, project: str, name: str, id: str, resume: str, reinit: str) -> SimpleNamespace:
        assert (name, resume, reinit) == ("same", "allow", "create_new"), "one run for all of a process"
        lines = self.runs.setdefault(id, [])
        return SimpleNamespace(log=lambda figures, step: lines.append((step, figures)))


class FakeMlflow(ModuleType):
    """Fake of MLflow's client (mlflow 3.17): records runs; its server can be down."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, list[tuple[int, str, float]]] = {}
        self.down, self.asked = False, 0
        self.deleted: set[str] = set()
        self.refuses = ""
        self.exceptions = ModuleType("mlflow.exceptions")
        self.exceptions.MlflowException = type("MlflowException", (Exception,), {})  # type: ignore[attr-defined]
        self.entities = ModuleType("mlflow.entities")
        self.entities.Metric = lambda key, value, timestamp, step: (step, key, value)  # type: ignore[attr-defined]

    def set_experiment(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id="1")

    def MlflowClient(self) -> "FakeMlflow":
        return self

    def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
        own = f"run{len(self.runs)}"
        self.runs[own] = []
        return SimpleNamespace(info=SimpleNamespace(run_id=own))

    def get_run(self, run_id: str) -> SimpleNamespace:
        if self.refuses or run_id not in self.runs:
            error = self.exceptions.MlflowException("no such run")  # type: ignore[attr-defined]
            error.error_code = self.refuses or "RESOURCE_DOES_NOT_EXIST"
            raise error
        stage = "deleted" if run_id in self.deleted else "active"
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage=stage))

    def update_run(self, run_id: str, status: str) -> None:
        assert run_id in self.runs

    def set_terminated(self, run_id: str) -> None:
        pass

    def log_batch(self, run_id: str, metrics: list[tuple[int, str, float]]) -> None:
        self.asked += 1
        if self.down:
            raise ConnectionError("Max retries exceeded\nwith url: /api")
        self.runs[run_id] += metrics


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeWandb, FakeMlflow]:
    wandb, mlflow = FakeWandb(), FakeMlflow()
    for module in (wandb, mlflow, mlflow.entities, mlflow.exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(trackers, "report_figures", lambda run, stage: lambda figures: None)
    return wandb, mlflow


def curves_of(folder: Path, stage: str = "sft") -> trackers.Curves:
    return trackers.Curves(["wandb", "mlflow"], "same", folder / "tensorboard", "sft", folder / f"{stage}.jsonl")


def test_each_run_directory_and_stage_has_a_run_of_its_own_in_the_trackers(
    tmp_path: Path, fakes: tuple[FakeWandb, FakeMlflow]
) -> None:
    """Arms and seeds of a grid have one name."""
    arms = [curves_of(tmp_path / "a"), curves_of(tmp_path / "b"), curves_of(tmp_path / "b", "warmup")]
    for number, arm in enumerate(arms):
        arm.write({"train/loss": float(number)}, 1)
    curves_of(tmp_path / "a").write({"train/loss": 7.0}, 2)  # the stage is resumed
    for name in ("sft.jsonl", "sft.trackers.json"):
        (tmp_path / "b" / name).unlink(missing_ok=True)  # begun anew
    curves_of(tmp_path / "b").write({"train/loss": 8.0}, 1)
    wandb, mlflow = fakes
    curves = [
        [(1, {"train/loss": 0.0}), (2, {"train/loss": 7.0})],
        *([(1, {"train/loss": x})] for x in (1.0, 2.0, 8.0)),
    ]
    assert list(wandb.runs.values()) == curves
    assert list(mlflow.runs.values()) == [
        [(step, "train.loss", line["train/loss"]) for step, line in c] for c in curves
    ]


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path, fakes: tuple[FakeWandb, FakeMlflow], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = fakes
    now = [0.0]
    monkeypatch.setattr(trackers, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0))
    curves = curves_of(tmp_path)
    mlflow.down = True
    curves.write({"x": 1.0}, 1)
    curves.write({"x": 2.0}, 2)
    assert mlflow.asked == 1, "each step waits for a dead server"
    now[0] += trackers.REST_S
    curves.write({"x": 3.0}, 3)
    mlflow.down, now[0] = False, now[0] + trackers.REST_S
    curves.write({"x": 4.0}, 4)
    [told] = notices_of(tmp_path / "sft.jsonl").read_text().splitlines()
    assert told.startswith("mlflow takes no curves now (ConnectionError: Max retries exceeded with url")
    assert [[step for step, _ in lines] for lines in wandb.runs.values()] == [[1, 2, 3, 4]]
    assert (mlflow.asked, list(mlflow.runs.values())) == (3, [[(4, "x", 4.0)]])
    trackers.Curves(["wandb"], "another", tmp_path, "sft", tmp_path / "x.jsonl").write({"x": 1.0}, 1)
    assert "wandb takes no curves now (AssertionError" in notices_of(tmp_path / "x.jsonl").read_text()


def test_a_run_that_mlflows_server_does_not_have_is_made_again(
    tmp_path: Path, fakes: tuple[FakeWandb, FakeMlflow]
) -> None:
    """It was deleted, for good or in MLflow's bin, or the server is another now."""
    _, mlflow = fakes
    curves_of(tmp_path).write({"x": 1.0}, 1)
    mlflow.runs = {"of others": []}
    curves_of(tmp_path).write({"x": 2.0}, 2)
    assert mlflow.runs == {"of others": [], "run1": [(2, "x", 2.0)]}
    mlflow.deleted = {"run1"}
    curves_of(tmp_path).write({"x": 3.0}, 3)
    mlflow.refuses = "PERMISSION_DENIED"
    curves_of(tmp_path).write({"x": 4.0}, 4)  # may pass: the run stays
    mlflow.refuses = ""
    curves_of(tmp_path).write({"x": 5.0}, 5)
    assert mlflow.runs["run2"] == [(3, "x", 3.0), (5, "x", 5.0)] and len(mlflow.runs) == 3


def test_training_waits_little_for_a_tracker_that_takes_minutes_to_fail(
    tmp_path: Path, fakes: tuple[FakeWandb, FakeMlflow], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mlflow = fakes
    now, waited = [0.0], [0.0]

    def fail(run_id: str, metrics: object) -> None:
        now[0] += 240.0
        waited[0] += 240.0
        raise ConnectionError

    monkeypatch.setattr(trackers, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0))
    monkeypatch.setattr(mlflow, "log_batch", fail)
    curves = curves_of(tmp_path)
    for step in range(2_000):
        curves.write({"x": 1.0}, step)
        now[0] += 20.0
    assert 480 <= waited[0] <= 0.06 * now[0]


def test_the_driver_prints_what_its_workers_trackers_report(
    tmp_path: Path, fakes: tuple[FakeWandb, FakeMlflow], capsys: pytest.CaptureFixture[str]
) -> None:
    """Once for runs that train together, and not again what was reported before this start."""
    fakes[1].down = True
    folders = [tmp_path / "a", tmp_path / "b"]
    notices = [notices_of(folder / "sft.jsonl") for folder in folders]
    for _ in range(2):
        with progress("sft", 1, lambda: (0, ""), notices):
            for folder in folders:
                curves_of(folder).write({"x": 1.0}, 1)
        assert capsys.readouterr().out.count("mlflow takes no curves now (ConnectionError: Max retries exceeded") == 1


def test_a_stage_that_is_redone_leaves_its_trackers_ids_with_its_old_results() -> None:
    """`Stage.owned` is what is set aside."""
    for stage, ids in ((SFT, "sft"), (GRPO, "grpo"), (SCORE, "warmup")):
        assert {f"metrics/{ids}.trackers.json", f"metrics/{ids}.notices.txt"} <= set(stage.traces)
