"""A grid's results as Markdown, CSV, LaTeX and a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from lorapar_ray.ablations.grids import Grid
from lorapar_ray.ablations.results import Overall, Summary, Verdict
from lorapar_ray.files import atomic_path

HEAD = ("arm", "learning rate", "trained", "accuracy", "95 % interval", "n", "by seed", "paper (7B)")
LATEX = str.maketrans({each: f"\\{each}" for each in "%&_#$"})


def rows(grid: Grid, base: Summary | None, found: dict[str, Summary]) -> list[tuple[str, ...]]:
    """The table's cells: first the base, then the arms in the grid's order; arms without results are left out."""
    lines = [] if base is None else [_cells(base, grid.base)]
    return lines + [_cells(found[arm.name], arm.paper) for arm in grid.arms if arm.name in found]


def _cells(row: Summary, paper: str) -> tuple[str, ...]:
    low, high = row.interval
    return (
        row.arm,
        f"{row.learning_rate:g}" if row.learning_rate else "–",
        "–" if row.active_share is None else f"{row.active_share:.1%}",
        f"{row.accuracy:.1%}",
        f"{low:.1%} – {high:.1%}",
        str(row.n),
        ", ".join(f"{each:.1%}" for _, each in sorted(row.by_seed.items())),
        paper or "–",
    )


def markdown(cells: Sequence[Sequence[str]], verdicts: Sequence[Overall | Verdict]) -> str:
    """The table, and a line for each claim."""
    lines = ["| " + " | ".join(HEAD) + " |", "| " + " | ".join("---" for _ in HEAD) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    if verdicts:
        lines += ["", "Verdicts, each with its interval; the paper's figures are of another model and data set.", ""]
        lines += [f"- **{each.found}**: {each.sentence}" for each in verdicts]
    return "\n".join(lines) + "\n"


def comma_separated(cells: Sequence[Sequence[str]]) -> str:
    """The table as CSV."""
    out = StringIO()
    csv.writer(out, lineterminator="\n").writerows([HEAD, *cells])
    return out.getvalue()


def latex(cells: Sequence[Sequence[str]]) -> str:
    """The table as a LaTeX tabular."""
    lines = [" & ".join(each.translate(LATEX) for each in row) + r" \\" for row in (HEAD, *cells)]
    body = [lines[0], r"\hline", *lines[1:]]
    return "\n".join([rf"\begin{{tabular}}{{{'l' + 'r' * (len(HEAD) - 1)}}}", *body, r"\end{tabular}"]) + "\n"


def write(
    out: Path, grid: Grid, base: Summary | None, found: dict[str, Summary], verdicts: Sequence[Overall | Verdict]
) -> str:
    """Write `table.md`, `table.csv`, `table.tex` and `plot.svg`; returns the first."""
    from lorapar_ray.ablations.charts import accuracies

    cells = rows(grid, base, found)
    text = markdown(cells, verdicts)
    for name, content in (("table.md", text), ("table.csv", comma_separated(cells)), ("table.tex", latex(cells))):
        with atomic_path(out / name) as draft:
            draft.write_text(content)
    if found:
        with atomic_path(out / "plot.svg") as draft:
            draft.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + accuracies(grid, base, found))
    return text
