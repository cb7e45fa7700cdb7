"""A whole run that is disturbed in every stage, at drawn moments: it does not fail, and ends as its undisturbed twin
does."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random

from lorapar_ray.pipeline import STAGES
from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.twin import ends_as_its_twin, entry, is_done
from tests.tiny_run import GRPO_STEPS, ROOT, command, metrics, sums_in
from tests.waiting import wait_until

LIMIT_S = 900


def moments(run: Path, chance: Random) -> dict[str, Callable[[], bool]]:
    """Of each stage, whether it has got as far as it shall be disturbed."""
    steps, versions = chance.randint(1, 4), chance.randint(1, GRPO_STEPS - 3)
    return {
        "label": lambda: (run / "work" / "votes.sqlite").is_file(),
        "score": lambda: bool(sums_in(run)),
        "sft": lambda: len(metrics(run, "sft")) >= steps,
        "grpo": lambda: len(metrics(run, "grpo")) >= versions,
        "evaluate": lambda: bool(entry(run, "evaluate")),
    }


def ends_undisturbed(
    finished: FinishedRun,
    run: Path,
    environment: Mapping[str, str],
    fault: str,
    disturb: Callable[[str], str],
    chance: Random,
    recovery: Recovery,
    *,
    around: Sequence[str] = (),
    may_end: str = "",
) -> None:
    """Begin a run, disturb it in each stage, and compare it with its twin.

    Args:
        environment: of the command and all its processes.
        fault: as in the test's marks.
        disturb: takes the stage that is at work; returns how.
        around: begins the command's own command line.
        may_end: the disturbance kills processes; if the command ends with these words, it is begun again.
    """
    log, deadline = run.with_suffix(".log"), time.monotonic() + LIMIT_S

    def begun() -> subprocess.Popen[bytes]:
        with log.open("a") as output:
            return subprocess.Popen(
                [*around, *command("run", finished.config, "--run-dir", run)],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    process = begun()

    def wait_for(what: str, seen: Callable[[], bool]) -> None:
        def look() -> bool:
            nonlocal process
            if not seen() and process.poll() is not None and not seen():
                told = log.read_text()
                assert process.returncode == 2 and may_end and may_end in told.splitlines()[-1], (
                    f"{what}: {told[-3000:]}"
                )
                process = begun()
            return seen()

        try:
            wait_until(what, look, deadline - time.monotonic())
        except TimeoutError as error:
            raise TimeoutError(f"{what}: {log.read_text()[-3000:]}") from error

    try:
        for stage, at_work in moments(run, chance).items():
            wait_for(f"{stage} begins", at_work)
            assert not is_done(run, stage), "it was over before it was disturbed"
            how = disturb(stage)
            with recovery(stage, fault, how):
                wait_for(f"{stage} ends", partial(is_done, run, stage))
        assert process.wait(LIMIT_S) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    for stage in STAGES:
        ends_as_its_twin(stage, run, finished.run)
    if not may_end:
        assert not any(line.get("engines_replaced") for line in metrics(run, "grpo")), "nobody had died"
