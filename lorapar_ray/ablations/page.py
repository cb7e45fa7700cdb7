"""A grid's page: verdicts, plots and the table, one file with everything inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from lorapar_ray.ablations import charts, tables
from lorapar_ray.ablations.grid import Arm, Grid, sentence
from lorapar_ray.ablations.results import Overall, Summary, Verdict
from lorapar_ray.ablations.retention import Point, mean_of
from lorapar_ray.ablations.sequence import Matrix
from lorapar_ray.ablations.tables import Said
from lorapar_ray.ablations.verdicts import level_shown
from lorapar_ray.boundary import read_lines
from lorapar_ray.files import atomic_path
from lorapar_ray.reporting.html import rendered

MARKS = {"held": "✓", "not held": "✗", "undecided": "?"}


def write_page(
    target: Path,
    grid: Grid,
    about: str,
    arms: Sequence[Arm],
    base: Summary | None,
    found: Mapping[str, Summary],
    verdicts: Sequence[Verdict],
    folders: Mapping[str, Sequence[Path]],
    *,
    planned: int,
    found_tables: Sequence[tables.Table],
    failed: Sequence[str] = (),
    overall: Sequence[Overall] = (),
    kept: Sequence[Said] = (),
    lines: Mapping[str, Mapping[str, Sequence[Point]]] | None = None,
    matrices: Mapping[str, Matrix] | None = None,
    systems: Sequence[int] = (),
    claims: int = 1,
) -> None:
    """Write the page; unfinished runs are left out.

    Args:
        about: what the grid compares.
        folders: run directories by arm.
        planned: number of runs to evaluate.
        found_tables: first the arms' accuracies.
        overall: verdicts on several of `verdicts` together.
        kept: verdicts on more than accuracy.
        lines: points of a retention grid, by line and arm.
        matrices: of Systems in sequence, the skills by arm, means over seeds.
        systems: these Systems, in the order of training.
        claims: number of claims that the grid decides.
    """
    plots = []
    if found:
        plots.append(charts.accuracies(grid, base, found))
    if verdicts:
        plots.append(charts.effects(verdicts))
    if lines:
        plots.append(charts.frontier({line: [mean_of(each) for each in arms.values()] for line, arms in lines.items()}))
    if matrices:
        plots.append(charts.matrices(matrices, systems))
    if curves := loss_lines(folders):
        plots += charts.losses(curves)
    html = rendered(
        "grid.html.j2",
        title=f"Grid {grid.name}",
        help=sentence(about),
        marks=MARKS,
        verdicts=[*overall, *verdicts, *kept],
        plots=[Markup(plot) for plot in plots],
        tables=found_tables,
        arms=arms,
        finished=sum(len(each.by_seed) for each in found.values()),
        planned=planned,
        failed=failed,
        claims=claims,
        level=level_shown(claims),
    )
    with atomic_path(target) as draft:
        draft.write_text(html, encoding="utf-8")


def loss_lines(folders: Mapping[str, Sequence[Path]]) -> dict[str, list[charts.Line]]:
    """Stage 1's loss by arm and seed, if any."""
    found: dict[str, list[charts.Line]] = {}
    for arm, runs in folders.items():
        for run in runs:
            lines = [each for each in read_lines(run / "metrics" / "sft.jsonl") if "loss" in each]  # else not finite
            if lines:
                line = [each["step"] for each in lines], [each["loss"] for each in lines]
                found.setdefault(arm, []).append(line)
    return found
