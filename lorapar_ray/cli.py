"""`lorapar`: its commands, and one line for a user's error."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper

import typer

from lorapar_ray.ablations.grids import GRIDS
from lorapar_ray.commands.ablate import ablate
from lorapar_ray.commands.evaluate import evaluate, lm_eval
from lorapar_ray.commands.inspection import doctor, status
from lorapar_ray.commands.results import export, serve
from lorapar_ray.commands.stages import partition, run_all, stage_command
from lorapar_ray.commands.submit import submit
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import ORDER

OF_THE_PLACE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ELOOP,
    errno.EMFILE,
    errno.EIO,
    errno.ESTALE,
    errno.EBUSY,
)
"""Errors of a disk, a directory or a path, not of this program."""

OWN_OPTIONS: dict[str, tuple[Callable[..., None], str]] = {
    "partition": (partition, " With several θ, show each cut."),
    "evaluate": (evaluate, " With --model no run is needed."),
}
"""Stages whose command has options of its own, and the end of its help."""

app = typer.Typer(
    help="LoRA-PAR on Ray: label, score, partition, SFT, GRPO, evaluate, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for stage in ORDER:
    command, more = OWN_OPTIONS.get(stage.name) or (stage_command(stage.name), "")
    app.command(stage.name, help=stage.help + more)(command)
app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(lm_eval)
app.command("run")(run_all)
app.command()(submit)
app.command()(status)
app.command()(export)
app.command()(serve)
app.command(help="Run a grid of arms, and report which claims hold. Grids: " + ", ".join(GRIDS) + ".")(ablate)
app.command()(doctor)


def main() -> None:
    """Entry point: a user's error is one line and exit status 2."""
    from lorapar_ray.redact import remember_environment
    from lorapar_ray.text import one_line

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    remember_environment()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it warns of a kernel that it lacks
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that is not UTF-8 shows escapes, not a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except UserError as error:
        said: object = getattr(error, "cause", error)  # one from a Ray task carries the task's traceback
    except OSError as error:
        found: object = getattr(error, "cause", error)
        if not isinstance(found, OSError) or found.errno not in OF_THE_PLACE:
            raise
        said = f"'{found.filename}': {found.strerror}; make it writable, free disk space, or choose another --run-dir"
    else:
        return
    print(f"lorapar: {one_line(said)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
