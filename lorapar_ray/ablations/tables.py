"""A grid's results as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Protocol

from lorapar_ray.ablations.grid import Grid
from lorapar_ray.ablations.paper import Figures
from lorapar_ray.ablations.results import Summary
from lorapar_ray.ablations.verdicts import Found
from lorapar_ray.evaluation.task_files import file_name
from lorapar_ray.files import atomic_path

HEAD = ("arm", "learning rate", "trained", "accuracy", "95 % interval", "n", "by seed")
"""Before the paper's figures."""
LATEX = str.maketrans({each: f"\\{each}" for each in "%&_#$"})


def rows(grid: Grid, base: Summary | None, found: Mapping[str, Summary], figures: Figures) -> list[tuple[str, ...]]:
    """The table's cells: first the base, then the arms in the grid's order; arms without results are left out."""
    lines = [] if base is None else [_cells(base, figures.base)]
    return lines + [_cells(found[arm.name], figures.arms.get(arm.name, "")) for arm in grid.arms if arm.name in found]


def head(figures: Figures) -> tuple[str, ...]:
    """The names of the columns."""
    return (*HEAD, f"paper ({figures.of})")


def _cells(row: Summary, paper: str) -> tuple[str, ...]:
    low, high = row.interval
    return (
        row.arm,
        _rate(row),
        _trained(row),
        f"{row.accuracy:.1%}",
        f"{low:.1%} – {high:.1%}",
        str(row.n),
        ", ".join(f"{each:.1%}" for _, each in sorted(row.by_seed.items())),
        paper or "–",
    )


def _rate(row: Summary) -> str:
    tried = f" ({row.end} tried)" if row.end else ""
    return f"{row.learning_rate:g}{tried}" if row.learning_rate else "–"


def _trained(row: Summary) -> str:
    share = "–" if row.active_share is None else f"{row.active_share:.1%}"
    return share if row.elements is None else f"{share} ({row.elements:,})"


@dataclass(frozen=True)
class Table:
    """A table of cells, and lines below it."""

    name: str
    """Of its files."""
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""
    lines: Sequence[str] = ()

    def markdown(self) -> str:
        """With the lines."""
        found = [f"| {' | '.join(row)} |" for row in (self.head, ["---"] * len(self.head), *self.rows)]
        return "\n".join([*found, "", *self.lines] if self.lines else found) + "\n"

    def comma_separated(self) -> str:
        """As CSV."""
        out = StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.head, *self.rows])
        return out.getvalue()

    def latex(self) -> str:
        """As a LaTeX tabular."""
        first, *rest = (" & ".join(each.translate(LATEX) for each in row) + r" \\" for row in (self.head, *self.rows))
        columns = "l" + "r" * (len(self.head) - 1)
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", first, r"\hline", *rest, r"\end{tabular}"]) + "\n"

    def write(self, out: Path) -> str:
        """Write it as Markdown, CSV and LaTeX; returns the first."""
        text = self.markdown()
        for ending, content in (("md", text), ("csv", self.comma_separated()), ("tex", self.latex())):
            with atomic_path(out / f"{self.name}.{ending}") as draft:
                draft.write_text(content, encoding="utf-8")
        return text


class Said(Protocol):
    """A verdict."""

    @property
    def found(self) -> Found:
        """Whether the claim held."""

    @property
    def sentence(self) -> str:
        """It in words."""


def bullets(verdicts: Iterable[Said]) -> list[str]:
    """A line for each verdict."""
    return [f"- **{each.found}**: {each.sentence}" for each in verdicts]


def accuracy_table(
    grid: Grid,
    base: Summary | None,
    found: Mapping[str, Summary],
    figures: Figures,
    verdicts: Sequence[Said],
    task: str,
    sweep: str = "",
) -> Table:
    """Accuracies with a line for each verdict.

    Args:
        task: of lm-eval; empty: the test rows.
        sweep: how the learning rates were found, a sentence.
    """
    said = "Verdicts, each with its interval."
    lines = [f"Accuracy on {task}.", ""] if task else []
    lines += [sweep, ""] if sweep else []
    lines += [said, "", *bullets(verdicts)] if verdicts else []
    name, title = (
        (f"table-{file_name(task)}", f"Accuracy on {task}") if task else ("table", "Accuracy on the test rows")
    )
    return Table(name, head(figures), rows(grid, base, found, figures), title, lines)
