"""Work that runs once, as a task on some machine: a process that is lost is replaced, but not without end."""

import os
from pathlib import Path

import pytest
import ray

from lorapar_ray.errors import UserError
from lorapar_ray.workers import TASK_TRIES, on_a_worker

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
