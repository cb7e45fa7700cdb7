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
    option = "--out" if value_of("--model", given) is not None else "--run-dir"  # models are evaluated without a run
    place = value_of(option, given)
    if place is None and "--help" not in given:
        sys.exit(f"lorapar: {option}: give a directory that every node can reach; Ray deletes the job's own directory")
    if place is not None:
        try:
            require_whole_path(place, option)
        except UserError as error:
            sys.exit(f"lorapar: {error}")
    sys.argv = [sys.argv[0], command, *given]
    main()


SHORT = {"--run-dir": "-d", "--model": "-m", "--out": "-o"}


def value_of(option: str, words: list[str]) -> str | None:
    """The value of an option of `SHORT`, or of its short form, on a command line; None without it."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word in (option, SHORT[option]):
            return after
        if word.startswith((f"{option}=", SHORT[option])):
            return word.removeprefix(f"{option}=").removeprefix(SHORT[option])
    return None
