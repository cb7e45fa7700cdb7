"""What every job of this folder does: find the package, join the job's cluster, run one command of `lorapar`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def job(command: str) -> None:
    """Run `lorapar COMMAND` with this process's arguments, inside a submitted Ray job."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted working directory, uninstalled
    from lorapar_ray.cli import main
    from lorapar_ray.run_lock import JOB_WAIT_S, WAIT

    os.environ.setdefault("RAY_ADDRESS", "auto")
    os.environ.setdefault(WAIT, JOB_WAIT_S)
    given = sys.argv[1:]
    if not any(word.startswith(("--run-dir", "-d", "--help")) for word in given):
        sys.exit("lorapar: --run-dir: give a directory that every node can reach; the job's own goes when it ends")
    sys.argv = [sys.argv[0], command, *given]
    main()
