"""A machine is out of memory, for a moment in every stage or from the start: Ray kills processes. The run, or the same
command begun again, ends as its twin does."""

import subprocess
from pathlib import Path
from random import Random

import pytest

from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.disturbed import ends_undisturbed
from tests.e2e.memory import SCARCE, replaceable
from tests.e2e.test_interruption import copy_before
from tests.e2e.twin import ends_as_its_twin
from tests.tiny_run import ROOT, command, lorapar

pytestmark = pytest.mark.e2e
SAID = "the machine ran out of memory"
END_S = 500
"""Until a command without memory has to have ended."""


@pytest.mark.chaos("label", "out of memory")
@pytest.mark.chaos("score", "out of memory")
@pytest.mark.chaos("sft", "out of memory")
@pytest.mark.chaos("grpo", "out of memory")
@pytest.mark.chaos("evaluate", "out of memory")
def test_memory_that_runs_out(chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path) -> None:
    memory = replaceable(tmp_path / "memory")

    def run_out(stage: str) -> str:
        memory.run_out()
        return ""

    around = {"around": memory.around, "may_end": SAID}
    ends_undisturbed(finished, tmp_path / "run", {}, "out of memory", run_out, chance, recovery, **around)


@pytest.mark.parametrize("stage", ["label", "score", "sft", "grpo", "evaluate"])
@pytest.mark.chaos("label", "out of memory")
@pytest.mark.chaos("score", "out of memory")
@pytest.mark.chaos("sft", "out of memory")
@pytest.mark.chaos("grpo", "out of memory")
@pytest.mark.chaos("evaluate", "out of memory")
def test_no_memory_from_the_start(
    chaos_round: int, recovery: Recovery, finished: FinishedRun, tmp_path: Path, stage: str
) -> None:
    memory, run = replaceable(tmp_path / "memory"), tmp_path / "run"
    if stage != "label":  # which begins with nothing
        copy_before(finished, stage, run)
    arguments = (stage, "-c", finished.config, "-d", run)
    memory.use(SCARCE)
    ended = subprocess.run(
        [*memory.around, *command(*arguments)], cwd=ROOT, capture_output=True, text=True, timeout=END_S
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"lorapar: {stage}: {SAID}"), ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    with recovery(stage, "out of memory", "from the start"):
        again = lorapar(*arguments)
    assert again.returncode == 0, again.stderr
    ends_as_its_twin(stage, run, finished.run)
