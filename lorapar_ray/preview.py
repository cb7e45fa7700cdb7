"""A cut in one line: the one on disk, or a preview."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import read_object
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import standings
from lorapar_ray.runs import RunDirectory

NOTHING = "  nothing to cut: no stage of this run trains a region only (sft.masked, grpo.masked)"


def preview(config: Config, run: RunDirectory) -> str:
    """One line about a previewed cut; the run does not change.

    Raises:
        UserError: there are no scores of these settings.
    """
    from lorapar_ray.partition.job import partition_stage

    if not config.partitioned:
        return NOTHING
    run.open(config)
    if standings(config, run)["score"].state != "done":
        raise UserError(f"partition: stage 'score' has not finished in '{run.place}'; run `lorapar score` first")
    with tempfile.TemporaryDirectory() as folder:
        aside = RunDirectory(run.root)
        aside.partition = Path(folder)
        return _line(partition_stage(config, aside))


def describe(config: Config, run: RunDirectory) -> str:
    """One line about the cut on disk."""
    if not config.partitioned:
        return NOTHING
    if config.partition.regions == "stages":
        return _line(read_object(run.partition / "summary.json"))
    from lorapar_ray.partition.systems import SUMMARY

    return _line(read_object(run.partition / SUMMARY))


def _line(summary: dict[str, Any]) -> str:
    if "systems" in summary:
        shares = ", ".join(f"System {system} {found['share']:.2%}" for system, found in summary["systems"].items())
        return f"  θ {summary['theta']:g}, {summary['regions']}: {shares}"
    shares = ", ".join(f"{name} {share:.2%}" for name, share in summary["total"]["shares"].items())
    overlap = f"Jaccard {summary['overlap']['jaccard']:.3f}{_control(summary)}"
    return f"  θ {summary['theta']:g}: {shares}; {overlap}"


def _control(summary: dict[str, Any]) -> str:
    """The same index between random halves of the scored examples, without which it says little."""
    points = summary.get("control") or []
    if not points:
        return ""
    found = points[-1]["jaccard"]  # of all examples
    within = f"{found['system1']:.3f} and {found['system2']:.3f}"
    return f" (random halves of the examples: {found['across']:.3f} across the Systems, {within} within one)"
