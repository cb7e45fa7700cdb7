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

from lorapar_ray.files import finished_files
from lorapar_ray.pipeline import STAGES
from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.twin import ends_as_its_twin, is_done
from tests.tiny_run import GRPO_STEPS, ROOT, command, metrics, stored_votes, sums_in
from tests.waiting import wait_until

LIMIT_S = 900
SLOWLY = [word for teacher in (0, 1) for word in ("--set", f"label.teachers.{teacher}.engine.max_num_seqs=2")]
"""So that the votes do not come all at once."""


def moments(run: Path, twin: Path, chance: Random) -> dict[str, Callable[[], bool]]:
    """Of each stage, whether it has got as far as it shall be disturbed: it has done a part of its work."""
    votes, judged = chance.randint(1, len(stored_votes(twin)) // 2), chance.choice((False, True))
    steps, versions = chance.randint(1, 4), chance.randint(1, GRPO_STEPS - 3)
    first = run / "eval" / "base.json" if judged else run / "work" / "evaluate" / "base-rows"
    return {
        "label": lambda: len(stored_votes(run)) >= votes,
        "score": lambda: bool(sums_in(run)),
        "sft": lambda: len(metrics(run, "sft")) >= steps,
        "grpo": lambda: len(metrics(run, "grpo")) >= versions,
        "evaluate": lambda: first.is_file() or bool(finished_files(first)),
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
                [*around, *command("run", finished.config, "--run-dir", run, *SLOWLY)],
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
        for stage, at_work in moments(run, finished.run, chance).items():
            wait_for(f"{stage} is at work", at_work)
            if stage == "label":
                votes = stored_votes(run)
                assert len(votes) < len(stored_votes(finished.run)), "no vote was in flight"
            assert not is_done(run, stage), "it was over before it was disturbed"
            how = disturb(stage)
            with recovery(stage, fault, how):
                wait_for(f"{stage} ends", partial(is_done, run, stage))
        assert process.wait(LIMIT_S) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    after = stored_votes(run)
    assert all(after[key] == seconds for key, seconds in votes.items()), "a stored vote was asked for again"
    for stage in STAGES:
        ends_as_its_twin(stage, run, finished.run)
    if not may_end:
        assert not any(line.get("engines_replaced") for line in metrics(run, "grpo")), "nobody had died"
