import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tiny_run import lorapar, save_tiny_student, tiny_config, write_config


class FinishedRun(NamedTuple):
    """A whole pipeline run on the tiny student."""

    student: Path
    config: Path
    run: Path
    log: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root = tmp_path_factory.mktemp("tiny")
    student = save_tiny_student(root / "student")
    config = write_config(root / "tiny.yaml", tiny_config(student))
    return FinishedRun(student, config, root / "run", lorapar("run", config, "--run-dir", root / "run"))
