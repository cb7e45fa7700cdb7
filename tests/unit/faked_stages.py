"""Fault injection: stages whose bodies only write files, and kill their process where configured.

Everything around a body is real: the command line, the pipeline, the manifest, the lock and the trash.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorapar_ray.cli import app
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Stage

FAULT = "LORAPAR_TEST_FAULT"
"""`<stage> kill`, or before it has written anything `<stage> kill-at-once` or `<stage> fail-at-once`."""


def fake(stage: Stage) -> Stage:
    """The stage with a fake body."""

    def body(config: Config, run: RunDirectory) -> dict[str, Any]:
        fault = os.environ.get(FAULT, "")
        if fault == f"{stage.name} fail-at-once":
            raise UserError("an input does not open")
        if fault == f"{stage.name} kill-at-once":
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint = run.root / (stage.scratch or stage.outputs)[0] / "checkpoint"
        resumed = checkpoint.is_file()
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text("half of the work")
        results = {"partition": {"theta": config.partition.theta}, "sft": {"epochs": config.sft.epochs}}
        if fault == f"{stage.name} kill":
            os.kill(os.getpid(), signal.SIGKILL)
        for place in stage.outputs:
            path = run.root / place if Path(place).suffix else run.root / place / "result.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results.get(stage.name, {})))
        if stage.name == "partition":
            cut = {"theta": config.partition.theta, "total": {"shares": {}}, "overlap": {"jaccard": 0.5}}
            (run.partition / "summary.json").write_text(json.dumps(cut))
        return {"resumed": resumed}

    return replace(stage, run=body, uses_ray=lambda _: False, check=lambda _: None)


def use_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stage in list(PIPELINE.items()):
        monkeypatch.setitem(PIPELINE, name, fake(stage))


def lorapar(*arguments: str | Path) -> tuple[int, str]:
    """Run the command line in this process; returns the exit status and the output."""
    outcome = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(outcome.exception, UserError):
        return 2, str(outcome.exception)
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.output


def killed(*arguments: str | Path) -> None:
    """The same in a separate process, which the fault kills with SIGKILL, so that no `finally` block runs."""
    in_a_child(lambda: lorapar(*arguments), signal.SIGKILL)


def in_a_child(work: Callable[[], Any], ends_by: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == ends_by, status
