"""Several machines: time from submission to the first log line, network bytes per step, and recovery time after a loss.

    python jobs/benchmarks/cluster.py [--quick] --json FILE

Needs root. Three machines made of Linux namespaces (`tests/hosts`) run the tiny pipeline: teachers on one, an engine on
another, two learners on two. The model has a few thousand weights and the cores are shared, so the times are those of
Ray, process starts and network protocols, not of a GPU.

- Submit: `lorapar submit`, without its check, until its first line; the peer is a bare Ray job that prints a line.
- Bytes: sent and received by each machine's network card while stage 2 makes steps, and in the same time at rest. The
  peer of a step is a push of every weight to one engine.
- Recovery: from `kill -9` of the engine's raylet, and of a learner's, until stage 2 has written its second step after
  it, compared with two usual steps; a machine whose command failed is restarted at once. `--quick` leaves this out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from _rows import Row, print_table, write_rows

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.hosts.machines import why_not  # noqa: E402
from tests.hosts.run import Sent, write_sent  # noqa: E402
from tests.hosts.topology import topology  # noqa: E402
from tests.tiny_run import metrics, save_tiny_student  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

FIRST_LINE_GOAL_S = 10.0
STEPS = 60
WATCHED = 10
"""Number of steps over which bytes are counted."""
REST_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no recoveries")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"no machines inside this one: {reason}")
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        student = save_tiny_student(root / "shared" / "student")
        weights = sum(file.stat().st_size for file in student.glob("*.safetensors"))
        with topology(root) as cluster:
            sent = Sent(cluster, write_sent(root / "client" / "sent"), root / "shared")
            rows = measured(sent, weights, recoveries=not arguments.quick)
    print_table(rows)
    write_rows(arguments.json, rows)


def measured(sent: Sent, weights: int, *, recoveries: bool) -> list[Row]:
    """All rows, from one run."""
    ray_alone = first_line_s(bare_job(sent), "hello")
    at_rest = {name: sum(amounts) / REST_S for name, amounts in traffic(sent, lambda: time.sleep(REST_S)).items()}
    run = sent.shared / "runs" / "measured"
    job = sent.submit("runs/measured", "--no-check", "--set", f"grpo.steps={STEPS}")
    ours = first_line_s(job, "label")
    rows = [
        Row(
            "submit to the first line",
            ours,
            ray_alone,
            "s",
            ours / ray_alone,
            f"< {FIRST_LINE_GOAL_S:g} s",
            ours < FIRST_LINE_GOAL_S,
        )
    ]
    with drained(job):
        wait_for_step(run, 3)
        rows += step_rows(sent, run, at_rest, weights)
        if recoveries:
            rows += [recovery(sent, run, name) for name in ("engines", "training")]
    return rows


def bare_job(sent: Sent) -> subprocess.Popen[str]:
    """A job with the same folder, submitted by `ray job submit`, that prints a line."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", sent.cluster.address, "--working-dir", ".", "--", "echo", "hello"]
    return subprocess.Popen(
        command,
        cwd=sent.folder,
        env=sent.cluster.client(HOME=str(sent.folder.parent), PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def first_line_s(job: subprocess.Popen[str], beginning: str) -> float:
    """Seconds until a job that was just submitted prints a line with this beginning."""
    start = time.monotonic()
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith(beginning):
            return time.monotonic() - start
    raise RuntimeError(f"the job ended without saying '{beginning}'")


@contextmanager
def drained(job: subprocess.Popen[str]) -> Iterator[None]:
    """Read the job's output, so that its client does not block; the run is left unfinished."""
    reader = threading.Thread(target=lambda: list(job.stdout or ()), daemon=True)
    reader.start()
    try:
        yield
    finally:
        job.kill()
        job.wait()


def traffic(sent: Sent, during: Callable[[], object]) -> dict[str, tuple[int, int]]:
    """Bytes that each machine sent and received during the call."""
    before = {name: machine.traffic() for name, machine in sent.cluster.on.items()}
    during()
    after = {name: machine.traffic() for name, machine in sent.cluster.on.items()}
    return {name: (after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in before}


def wait_for_step(run: Path, step: int) -> None:
    """Wait until stage 2 has written this step."""
    wait_until(f"step {step}", lambda: len(metrics(run, "grpo")) >= step, 600, every_s=0.02)


def step_rows(sent: Sent, run: Path, at_rest: dict[str, float], weights: int) -> list[Row]:
    """Bytes through each machine's network card per step."""
    first, start = len(metrics(run, "grpo")), time.monotonic()
    found = traffic(sent, lambda: wait_for_step(run, first + WATCHED))
    steps, seconds = len(metrics(run, "grpo")) - first, time.monotonic() - start
    rows = [Row("a step of stage 2", seconds / steps, None, "s", None, "", None)]
    for name, (out, into) in found.items():
        each = (out + into - at_rest[name] * seconds) / steps / 1000
        peer = weights / 1000 if name == "engines" else None
        ratio = each / peer if peer else None
        rows.append(Row(f"through {name}'s card in a step, above rest", each, peer, "kB", ratio, "", None))
        rows.append(Row(f"through {name}'s card at rest", at_rest[name] / 1000, None, "kB/s", None, "", None))
    return rows


def recovery(sent: Sent, run: Path, name: str) -> Row:
    """Seconds until the second step after the loss of a machine's Ray; the first may have been sampled already."""
    begun, usual = len(metrics(run, "grpo")), median_step_s(run)
    start = time.monotonic()
    sent.cluster.kill_raylet(name)
    wait_for_step(run, begun + 2)
    lost = time.monotonic() - start
    return Row(f"raylet of '{name}' killed, until the second step after", lost, 2 * usual, "s", None, "", None)


def median_step_s(run: Path) -> float:
    """Median seconds of the steps so far."""
    return median(line["seconds"] for line in metrics(run, "grpo"))


if __name__ == "__main__":
    main()
