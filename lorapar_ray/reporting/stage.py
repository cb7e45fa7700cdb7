"""Stage `report`: plots and tables of the run's results."""

from __future__ import annotations

from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Stage


def run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Write the page; notes which results it calls out of date, since it is to be written again when that changes."""
    from lorapar_ray.progress import console
    from lorapar_ray.reporting.page import write_report
    from lorapar_ray.result_stages import said, state_of_run

    outdated = state_of_run(config, run).outdated
    console.print(f"  {write_report(config, run)}")
    if outdated:
        console.print(f"  out of date with what is in the run now: {said(outdated)}")
    return {"outdated": outdated}


def needs(config: Config) -> tuple[str, ...]:
    """Every stage of the run; the page names stages that have not run."""
    return ("label", "score", "partition", *config.order, "evaluate")


STAGE = Stage(
    name="report",
    help="Write report/index.html from what the run holds so far.",
    needs=needs,
    settings=lambda _: {},
    run=run,
    outputs=("report",),
    uses_ray=lambda _: False,
    is_view=True,
)
