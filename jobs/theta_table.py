"""A Markdown table of what a partition keeps at each θ, compared with the paper's figures.

    python jobs/theta_table.py RUN_DIRECTORY...

Needs runs whose `partition` has finished. The paper's rows are LLaMA2-7B on GSM8K (arXiv 2507.20999, θ sweep and
section on overlap); it reports its Jaccard index at θ = 0.9 only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lorapar_ray.reporting.partition_charts import PAPER_KEPT

PAPER_JACCARD = {0.9: "0.614"}


def main() -> None:
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    for run in map(Path, sys.argv[1:]):
        summary = json.loads((run / "partition" / "summary.json").read_text(encoding="utf-8"))
        print(f"\n**{run.name}**: {summary['total']['elements']:,} elements\n")
        print("\n".join(table(summary["curves"])))
        print("\n".join(control(summary["control"])))


def table(curves: dict[str, Any]) -> list[str]:
    """A row per θ: kept share in % of each System and of the paper, and the Jaccard index, by subset of modules."""
    subsets = [name for name in PAPER_KEPT if name in curves]
    head = [f"{name.upper()} {column}" for name in subsets for column in ("S1", "S2", "paper", "Jaccard")]
    lines = ["| θ | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for index, theta in enumerate(curves["theta"]):
        cells = [f"{theta:g}"]
        for name in subsets:
            cells += [f"{100 * curves[name][system][index]:.2f}" for system in ("system1", "system2")]
            cells.append(f"{PAPER_KEPT[name][index]:.2f}")
            paper = PAPER_JACCARD.get(theta) if name == "qkvgud" else None
            cells.append(f"{curves[name]['jaccard'][index]:.3f}" + (f" ({paper})" if paper else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def control(curve: list[dict[str, Any]]) -> list[str]:
    """The signal-or-noise control: agreement of halves within and across Systems by scored examples."""
    columns = [(measure, pair) for measure in ("jaccard", "spearman") for pair in ("system1", "system2", "across")]
    lines = ["", "| examples | " + " | ".join(f"{m} {p}" for m, p in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for point in curve:
        values = " | ".join(f"{point[measure][pair]:.3f}" for measure, pair in columns)
        lines.append(f"| {' + '.join(map(str, point['examples']))} | {values} |")
    return [*lines, "", f"Warning: {curve[-1]['warning'] or 'none'}"] if curve else []


if __name__ == "__main__":
    main()
