"""Stage 1's files while it runs: checkpoints without pickle, metrics lines, trackers."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lorapar_ray.boundary import last_line, read_lines
from lorapar_ray.errors import UserError
from lorapar_ray.grpo import job as grpo
from lorapar_ray.sft import job as sft
from lorapar_ray.sft.checkpoint import OPTIMIZER, PARAMETERS, STATE, WORKERS, last_checkpoint, rng_state, set_rng_state
from lorapar_ray.tensortree import load_tree, save_tree
from lorapar_ray.tracking import append_line, keep_lines_until, require_trackers


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
