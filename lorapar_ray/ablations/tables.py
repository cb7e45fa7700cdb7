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
from lorapar_ray.ablations.results import Range, Summary
from lorapar_ray.ablations.verdicts import Found
from lorapar_ray.evaluation.task_files import file_name
from lorapar_ray.files import atomic_path

HEAD = ("arm", "learning rate", "trained", "accuracy", "95 % interval", "n", "by seed")
"""Before the paper's figures."""
NO_SEED = 0
"""The base's in its summary: it is the same in all runs."""
Numbers = dict[str, str | float | None]
"""A row as a program reads it: by column, shares of 1 instead of percent."""
LATEX = str.maketrans({each: f"\\{each}" for each in "%&_#$"})


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
        ", ".join(f"{seed}: {each:.1%}" for seed, each in sorted(row.by_seed.items()) if seed != NO_SEED) or "–",
        paper or "–",
    )


def _rate(row: Summary) -> str:
    tried = f" ({row.end} tried)" if row.end else ""
    return f"{_span(row.learning_rate, 'g')}{tried}" if row.learning_rate[1] else "–"


def _trained(row: Summary) -> str:
    share = "–" if row.active_share is None else _span(row.active_share, ".1%")
    return share if row.elements is None else f"{share} ({_span(row.elements, ',')})"


def _span(ends: Range, form: str) -> str:
    """A range over seeds; one value if all are shown alike."""
    return " – ".join(dict.fromkeys(format(each, form) for each in ends))


def _numbers(row: Summary, figures: Figures, paper: str, seeds: Sequence[int]) -> Numbers:
    found: Numbers = {"arm": row.arm}
    ranges = {
        "learning rate": row.learning_rate if row.learning_rate[1] else None,
        "trained share": row.active_share,
        "trained elements": row.elements,
    }
    for name, ends in ranges.items():
        found |= {f"{name}, least": ends[0] if ends else None, f"{name}, most": ends[1] if ends else None}
    found["end of the sweep"] = row.end
    found |= {"accuracy": row.accuracy, "95 % low": row.interval[0], "95 % high": row.interval[1], "n": row.n}
    found |= {f"seed {seed}": row.by_seed.get(seed) for seed in seeds}
    return found | {f"paper ({figures.of})": paper}


@dataclass(frozen=True)
class Table:
    """A table of cells, and lines below it."""

    name: str
    """Of its files."""
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""
    lines: Sequence[str] = ()
    numbers: Sequence[Numbers] = ()
    """The rows of its CSV; none: the cells."""

    def markdown(self) -> str:
        """With the lines."""
        found = [f"| {' | '.join(row)} |" for row in (self.head, ["---"] * len(self.head), *self.rows)]
        return "\n".join([*found, "", *self.lines] if self.lines else found) + "\n"

    def comma_separated(self) -> str:
        """As CSV: numbers, empty where there is none."""
        out, names = StringIO(), list(dict.fromkeys(name for row in self.numbers for name in row)) or self.head
        cells = [[_cell(row.get(name)) for name in names] for row in self.numbers] if self.numbers else self.rows
        csv.writer(out, lineterminator="\n").writerows([names, *cells])
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


def _cell(value: str | float | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


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
    shown = [] if base is None else [(base, figures.base)]
    shown += [(found[arm.name], figures.arms.get(arm.name, "")) for arm in grid.arms if arm.name in found]
    seeds = sorted({seed for row, _ in shown for seed in row.by_seed} - {NO_SEED})
    numbers = [_numbers(row, figures, paper, seeds) for row, paper in shown]
    return Table(name, head(figures), [_cells(*row) for row in shown], title, lines, numbers)
