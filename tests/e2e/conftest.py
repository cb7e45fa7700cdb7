import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
from filelock import FileLock

from tests.tiny_run import lorapar, save_tiny_student, tiny_config, write_config


class FinishedRun(NamedTuple):
    """A whole pipeline run on the tiny student."""

    student: Path
    config: Path
    run: Path
    status: int
    output: str
    left: list[str]
    """Its temporary files that are still there."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> FinishedRun:
    """Made once, also if several processes share the tests; a test that changes it uses a copy."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "tiny"
    root.mkdir(exist_ok=True)
    outcome = root / "outcome.json"
    with FileLock(root / "lock"):
        if not outcome.is_file():
            plain = tiny_config(save_tiny_student(root / "student"))
            plain["label"]["teachers"][1]["engine_of"] = "a"  # a start less for many tests
            config = write_config(root / "tiny.yaml", plain)
            with TemporaryDirectory(prefix="t", dir="/tmp") as scratch:  # Ray's sockets need a short path
                done = lorapar("run", config, "--run-dir", root / "run", TMPDIR=scratch)
                left = [str(path.relative_to(scratch)) for path in Path(scratch).rglob("*")]
            outcome.write_text(json.dumps([done.returncode, done.stdout + done.stderr, left]))
    return FinishedRun(root / "student", root / "tiny.yaml", root / "run", *json.loads(outcome.read_text()))
