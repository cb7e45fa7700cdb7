"""Work that runs once, as a task on some machine: a process that is lost is replaced, but not without end."""

import os
from pathlib import Path

import pytest
import ray

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import check, check_there
from lorapar_ray.workers import TASK_TRIES, on_a_worker
from tests.tiny_run import save_tiny_student, tiny_config

pytestmark = pytest.mark.cluster


def dies_once(folder: str) -> str:
    """Ends its process the first time."""
    mark = Path(folder) / "began"
    if not mark.exists():
        mark.touch()
        os._exit(1)
    return "done"


def dies(folder: str) -> None:
    """Ends its process every time."""
    Path(folder, str(os.getpid())).touch()
    os._exit(1)


def refuses() -> None:
    raise UserError("x: no such thing")


def test_a_task_survives_a_lost_process_and_gives_up_after_some(cluster: None, tmp_path: Path) -> None:
    once, always = tmp_path / "once", tmp_path / "always"
    once.mkdir()
    always.mkdir()
    assert on_a_worker(dies_once, str(once)) == "done"
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        on_a_worker(dies, str(always))
    assert len(list(always.iterdir())) == TASK_TRIES
    with pytest.raises(UserError, match=r"^x: no such thing$"):
        on_a_worker(refuses)


def test_the_driver_needs_no_student_to_check_a_run(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(save_tiny_student(tmp_path / "student"))
    config["grpo"] |= {"learners": 3, "sequence_parallel": 3}
    loaded = Config.model_validate(config)

    def missing(path: str) -> str:
        raise UserError(f"model '{path}': no such directory")

    monkeypatch.setattr("lorapar_ray.models.resolve_model", missing)  # in this process alone
    check(loaded, ("grpo",))
    with pytest.raises(UserError, match=r"3 learners cannot divide the model's \d attention heads"):
        check_there(loaded, ("sft", "grpo"))
