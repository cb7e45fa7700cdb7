"""Shared by every job of this folder: finds the package, joins the job's cluster and runs one `lorapar` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def job(command: str) -> None:
    """Run `lorapar COMMAND` with this process's arguments, inside a submitted Ray job."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted working directory, uninstalled
    from lorapar_ray.cli import main
    from lorapar_ray.errors import UserError
    from lorapar_ray.run_lock import JOB_WAIT_S, WAIT
    from lorapar_ray.submission import require_whole_path

    os.environ.setdefault("RAY_ADDRESS", "auto")
    os.environ.setdefault(WAIT, JOB_WAIT_S)
    given = sys.argv[1:]
    place = run_dir(given)
    if place is None and "--help" not in given:
        sys.exit("lorapar: --run-dir: give a directory that every node can reach; Ray deletes the job's own directory")
    if place is not None:
        try:
            require_whole_path(place)
        except UserError as error:
            sys.exit(f"lorapar: {error}")
    sys.argv = [sys.argv[0], command, *given]
    main()


def run_dir(words: list[str]) -> str | None:
    """The value of `--run-dir`, or `-d`, on a command line; None without it."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word in ("--run-dir", "-d"):
            return after
        if word.startswith(("--run-dir=", "-d")):
            return word.removeprefix("--run-dir=").removeprefix("-d")
    return None
