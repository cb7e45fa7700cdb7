"""A job's whole cluster dies in the middle of a stage. The same submission on a new cluster, as KubeRay makes it for
`backoffLimit`, goes on from storage, and the stage ends as that of an undisturbed run."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import pytest

from lorapar_ray.grpo.checkpoint import newest
from lorapar_ray.pipeline import STAGES
from lorapar_ray.run_lock import NAME as LOCK
from lorapar_ray.run_lock import SILENT_S
from lorapar_ray.sft.checkpoint import last_checkpoint
from tests.chaos import Recovery
from tests.e2e.clusters import JobCluster, environment_of, job_cluster, link_sources, new_token
from tests.e2e.conftest import FinishedRun
from tests.e2e.disturbed import SLOWLY, moments
from tests.e2e.test_interruption import copy_before
from tests.e2e.twin import ends_as_its_twin, is_done
from tests.tiny_run import metrics, stored_votes, sums_in
from tests.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.e2e
NODES = (["--num-cpus=3"],)
JOB = "lorapar-tiny"
"""The submission id, on both clusters."""


@pytest.mark.parametrize("stage", ["label", "score", "sft", "grpo", "evaluate"])
@pytest.mark.chaos("label", "cluster")
@pytest.mark.chaos("score", "cluster")
@pytest.mark.chaos("sft", "cluster")
@pytest.mark.chaos("grpo", "cluster")
@pytest.mark.chaos("evaluate", "cluster")
def test_a_new_cluster_goes_on_with_the_run(
    chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path, stage: str
) -> None:
    """Scoring's lock seems to be that of another machine, as it would be on Kubernetes: the new job waits for a sign of
    life before it takes over."""
    run, log = tmp_path / "run", tmp_path / "log"
    if stage != "label":
        copy_before(finished, stage, run)
    at_work, elsewhere = moments(run, finished.run, chance)[stage], stage == "score"
    folder, environment = link_sources(tmp_path / "sent"), environment_of(new_token(), tmp_path)
    (folder / "run.yaml").write_text(finished.config.read_text())

    def submit(cluster: JobCluster) -> str:
        command = ["python", "jobs/pipeline.py", "--config", "run.yaml", "--run-dir", run, *SLOWLY]
        return cluster.submit(folder, *command, job=JOB)

    before = Done(run)

    def works() -> bool:
        return at_work() and (stage not in ("sft", "grpo") or steps_saved(run)[stage] > 0)

    def wait_for(what: str, seen: Callable[[], bool], cluster: JobCluster) -> None:
        def look() -> bool:
            before.require_sums()
            if seen():
                return True
            ended = cluster.client.get_job_status(JOB).is_terminal()
            assert not ended or seen(), f"{what}: {cluster.client.get_job_logs(JOB)[-3000:]}"
            return False

        wait_until(what, look, LIMIT_S)

    with job_cluster(NODES, environment) as first:
        submit(first)
        wait_for(f"{stage} is at work", works, first)
        first.kill()
    assert not is_done(run, stage), "it was over before its cluster died"
    before = Done(run)
    if elsewhere:
        lock = json.loads((run / LOCK).read_text()) | {"host": "head-of-the-first"}
        (run / LOCK).write_text(json.dumps(lock))
    with recovery(stage, "cluster"), job_cluster(NODES, environment) as second:
        began = time.monotonic()
        assert submit(second) == JOB
        wait_for(f"{stage} ends", partial(is_done, run, stage), second)
        assert not elsewhere or time.monotonic() - began > SILENT_S, "the first might have lived"
        log.write_text(second.client.get_job_logs(JOB))
        second.kill()  # later stages are other cases
    said = log.read_text()
    assert [line for line in said.splitlines() if line.startswith("✓")][: STAGES.index(stage)] == [
        f"✓ {each}: done" for each in STAGES[: STAGES.index(stage)]
    ], said
    assert ("  waiting up to 400 s: run directory" in said) == elsewhere, said
    assert ("no sign of life for" in said) == elsewhere and "  takes over from process " in said, said
    before.require_kept()
    ends_as_its_twin(stage, run, finished.run)


class Done:
    """What a run has in storage of its unfinished stage."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._votes = stored_votes(run)
        self._sums = {file: file.stat().st_mtime_ns for file in sums_in(run)}
        self._steps = {name: metrics(run, name)[:steps] for name, steps in steps_saved(run).items()}

    def require_sums(self) -> None:
        """Those of scoring are still the same, as long as they are there."""
        for file, at in self._sums.items():
            with suppress(FileNotFoundError):
                assert file.stat().st_mtime_ns == at, f"{file.name} was computed again"

    def require_kept(self) -> None:
        """It was not done again; of a training stage's steps, those of the last checkpoint."""
        now = stored_votes(self._run)
        assert all(now[key] == seconds for key, seconds in self._votes.items()), "a stored vote was asked for again"
        for name, steps in self._steps.items():
            assert metrics(self._run, name)[: len(steps)] == steps, f"{name} began anew"


def steps_saved(run: Path) -> dict[str, int]:
    """By training stage, the steps of its newest checkpoint. A step's metrics are written before its checkpoint."""
    stage1 = last_checkpoint(run / "work" / "sft" / "checkpoints", 1)
    stage2 = newest(run / "work" / "grpo", 0, 1)
    return {"sft": stage1[1] if stage1 else 0, "grpo": stage2["step"] if stage2 else 0}
